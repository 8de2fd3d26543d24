import asyncio
import threading
from typing import Any

from echovlm_ray.serving.lm.mailbox import Mailbox


async def test_letters_of_many_threads_arrive_in_order_and_none_is_lost() -> None:
    mailbox: Mailbox[int] = Mailbox(asyncio.get_running_loop())
    queues: list[asyncio.Queue[int]] = [asyncio.Queue() for _ in range(4)]

    def speak(queue: asyncio.Queue[int]) -> None:
        put = mailbox.sink(queue)
        for number in range(500):
            put(number)
            mailbox.wake()

    threads = [threading.Thread(target=speak, args=(queue,)) for queue in queues]
    for thread in threads:
        thread.start()
    for queue in queues:
        assert [await asyncio.wait_for(queue.get(), 5) for _ in range(500)] == list(range(500))
    for thread in threads:
        thread.join()
    assert all(queue.empty() for queue in queues)


async def test_what_comes_together_wakes_the_loop_once() -> None:
    loop = asyncio.get_running_loop()
    calls = []
    call_soon = loop.call_soon_threadsafe

    def counting(*arguments: Any) -> Any:
        calls.append(arguments)
        return call_soon(*arguments)

    loop.call_soon_threadsafe = counting  # type: ignore[method-assign, assignment]
    mailbox: Mailbox[str] = Mailbox(loop)
    queues: list[asyncio.Queue[str]] = [asyncio.Queue() for _ in range(32)]
    try:
        for queue in queues:
            mailbox.sink(queue)("token")
        await asyncio.sleep(0)
        assert not calls, "the reader is woken too early"
        mailbox.wake()
        mailbox.wake()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(calls) == 1
        mailbox.wake()
    finally:
        del loop.call_soon_threadsafe
    assert [queue.get_nowait() for queue in queues] == ["token"] * 32
    assert len(calls) == 1


def test_a_closed_loop_takes_nothing_and_complains_of_nothing() -> None:
    loop = asyncio.new_event_loop()
    mailbox: Mailbox[int] = Mailbox(loop)
    put = mailbox.sink(asyncio.Queue())
    loop.close()
    put(1)
    mailbox.wake()
