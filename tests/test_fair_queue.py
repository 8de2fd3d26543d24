"""Callers take turns, and a place is never lost."""

import asyncio
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echovlm_ray.fair_queue import RESTRICTED_S, SHARED_S, FairQueue, FairSemaphore, FairThreads


def test_callers_take_turns_and_each_is_served_in_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "a4", "c1", "b2"):
        queue.append(item[:1].encode(), item)
    assert len(queue) == 7
    assert queue.first() == "a1"
    assert [queue.pop() for _ in range(7)] == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]
    assert not queue


def test_an_item_can_leave_out_of_its_turn() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.append(b"a", 1)
    queue.append(b"a", 2)
    assert queue.discard(b"a", 1)
    assert not queue.discard(b"a", 1)
    assert not queue.discard(b"b", 2)
    assert queue.pop() == 2
    queue.append(b"a", 3)
    queue.clear()
    assert not queue


@given(
    st.sampled_from([1, 2, 3]),
    st.lists(st.tuples(st.sampled_from([b"a", b"b"]), st.integers(0, 3), st.booleans()), max_size=30),
)
def test_no_place_is_lost(most_of_one: int, calls: list[tuple[bytes, int, bool]]) -> None:
    async def run() -> None:
        places = FairSemaphore(3, most_of_one)
        held: Counter[bytes] = Counter()

        async def call(caller: bytes, turns: int) -> None:
            async with places.place(caller):
                held[caller] += 1
                assert held[caller] <= most_of_one
                assert held.total() <= 3
                try:
                    for _ in range(turns):
                        await asyncio.sleep(0)
                finally:
                    held[caller] -= 1

        tasks = []
        for caller, turns, cancelled in calls:
            task = asyncio.create_task(call(caller, turns))
            tasks.append(task)
            await asyncio.sleep(0)
            if cancelled:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with places.place(b"c"), places.place(b"d"), places.place(b"e"):
            assert not held.total()

    asyncio.run(run())


def test_one_caller_with_many_does_not_keep_another_waiting() -> None:
    async def run() -> None:
        places, order = FairSemaphore(1), []

        async def call(caller: bytes) -> None:
            async with places.place(caller):
                order.append(caller)
                await asyncio.sleep(0)

        async with places.place(b"a"):
            waiting = [asyncio.create_task(call(caller)) for caller in (b"a", b"a", b"a", b"b")]
            await asyncio.sleep(0)
        await asyncio.gather(*waiting)
        assert order == [b"a", b"b", b"a", b"a"]

    asyncio.run(run())


def test_a_place_that_one_caller_may_not_have_is_free_for_another() -> None:
    async def run() -> None:
        places = FairSemaphore(3, 2)
        async with places.place(b"a"), places.place(b"a"):
            assert places.must_wait(b"a")
            waiting = asyncio.create_task(places.place(b"a").__aenter__())
            await asyncio.sleep(0)
            async with asyncio.timeout(1), places.place(b"b"):
                assert places.must_wait(b"b")
            assert not waiting.done()
        await waiting

    asyncio.run(run())


def test_a_caller_has_all_places_until_another_one_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        places = FairSemaphore(3, most_when_shared=2)
        async with places.place(b"a"), places.place(b"a"), places.place(b"a"):
            waiting = [asyncio.create_task(places.acquire(caller)) for caller in (b"a", b"b", b"b")]
            await asyncio.sleep(0)
        await asyncio.gather(*waiting)
        places.release(b"b")
        places.release(b"b")
        await places.acquire(b"a")
        assert places.must_wait(b"a")
        assert not places.must_wait(b"b")
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + SHARED_S + 1)
        assert not places.must_wait(b"a")
        places.restrict(b"a")
        assert places.must_wait(b"a")
        monkeypatch.setattr(time, "monotonic", lambda: now + SHARED_S + RESTRICTED_S + 2)
        assert not places.must_wait(b"a")

    asyncio.run(run())


@given(st.integers(1, 3), st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=40))
def test_all_get_a_place_however_many_are_left_to_others(most: int, callers: list[bytes]) -> None:
    async def run() -> None:
        places = FairSemaphore(3, most_when_shared=most)

        async def call(caller: bytes) -> None:
            async with places.place(caller):
                await asyncio.sleep(0)

        async with asyncio.timeout(10):
            await asyncio.gather(*[call(caller) for caller in callers])

    asyncio.run(run())


def test_threads_are_left_for_other_callers() -> None:
    async def run() -> None:
        with ThreadPoolExecutor(2) as pool:
            threads = FairThreads(pool, 2, 1)
            busy = threading.Event()
            long = [asyncio.create_task(threads.run(b"a", busy.wait, 10)) for _ in range(3)]
            await asyncio.sleep(0)
            async with asyncio.timeout(5):
                assert await threads.run(b"b", abs, -1) == 1
            assert not any(each.done() for each in long)
            busy.set()
            assert await asyncio.gather(*long) == [True] * 3

    asyncio.run(run())


def test_a_cancelled_call_keeps_its_thread_until_it_ends() -> None:
    async def run() -> None:
        with ThreadPoolExecutor(2) as pool:
            threads = FairThreads(pool, 2, 1)
            busy = threading.Event()
            first = asyncio.create_task(threads.run(b"a", busy.wait, 10))
            await asyncio.sleep(0)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            again = [asyncio.create_task(threads.run(b"a", busy.wait, 10)) for _ in range(3)]
            async with asyncio.timeout(5):
                assert await threads.run(b"b", abs, -1) == 1
            busy.set()
            assert await asyncio.gather(*again) == [True] * 3

    asyncio.run(run())
