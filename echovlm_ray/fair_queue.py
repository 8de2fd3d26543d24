"""Queues in which callers take turns, so that one with many items does not keep another's single one waiting."""

import asyncio
import functools
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Container
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

T = TypeVar("T")

# After a caller had a place, it may come back for so long.
SHARED_S = 60.0
# For so long a caller that took long is one that shares, whether others are there or not.
RESTRICTED_S = 600.0


class FairQueue(Generic[T]):
    """First in, first out for the items of one caller; among callers, round robin."""

    def __init__(self) -> None:
        self._items: OrderedDict[bytes, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(items) for items in self._items.values())

    @property
    def num_callers(self) -> int:
        """Callers with items."""
        return len(self._items)

    def count(self, caller: bytes) -> int:
        """Items of a caller."""
        return len(self._items.get(caller, ()))

    def append(self, caller: bytes, item: T) -> None:
        """Adds an item behind those of its caller."""
        self._items.setdefault(caller, deque()).append(item)

    def first(self) -> T:
        """The item that `pop` would take; the queue must not be empty."""
        return next(iter(self._items.values()))[0]

    def pop(self) -> T:
        """Takes the next item, and puts its caller behind all others; the queue must not be empty."""
        return self._pop(next(iter(self._items)))

    def pop_without(self, callers: Container[bytes]) -> tuple[bytes, T] | None:
        """As `pop`, passing over some callers, whose turn stays; the caller and the item, None if there is none."""
        caller = next((caller for caller in self._items if caller not in callers), None)
        return None if caller is None else (caller, self._pop(caller))

    def discard(self, caller: bytes, item: T) -> bool:
        """Takes an item out of its turn; whether it was there."""
        items = self._items.get(caller)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._items[caller]
        return True

    def clear(self) -> None:
        """Drops all items."""
        self._items.clear()

    def _pop(self, caller: bytes) -> T:
        items = self._items[caller]
        item = items.popleft()
        if items:
            self._items.move_to_end(caller)
        else:
            del self._items[caller]
        return item


class FairSemaphore:
    """A number of places that callers take in turn. Belongs to one event loop."""

    def __init__(self, places: int, most_of_one: int | None = None, *, most_when_shared: int | None = None) -> None:
        """
        Args:
            places: how many there are.
            most_of_one: how many of them one caller may hold; None for all.
            most_when_shared: the same, for a minute after another caller asked for a place or gave one back.
        """
        self._free = places
        self._most_of_one = places if most_of_one is None else most_of_one
        self._most_when_shared = self._most_of_one if most_when_shared is None else most_when_shared
        # When each caller was last here; the latest is the last.
        self._seen: OrderedDict[bytes, float] = OrderedDict()
        # Until when a caller is one that shares.
        self._restricted: dict[bytes, float] = {}
        self._held: Counter[bytes] = Counter()
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()

    def has_most(self, caller: bytes) -> bool:
        """Whether a caller holds as many places as it may."""
        return self._held[caller] >= (self._most_when_shared if self._is_shared(caller) else self._most_of_one)

    def must_wait(self, caller: bytes) -> bool:
        """Whether a caller would wait for a place."""
        return not self._free or self.has_most(caller)

    @asynccontextmanager
    async def place(self, caller: bytes) -> AsyncIterator[None]:
        """Waits for a place and holds it for the block."""
        await self.acquire(caller)
        try:
            yield
        finally:
            self.release(caller)

    async def acquire(self, caller: bytes) -> None:
        """Waits for a place and takes it."""
        self._see(caller)
        if self.must_wait(caller):
            await self._wait(caller)
        else:
            self._take(caller)

    async def _wait(self, caller: bytes) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(caller, turn)
        try:
            await turn
        except asyncio.CancelledError:
            # Cancelled in the moment in which it got the place, which is then the next one's.
            if not self._waiting.discard(caller, turn) and not turn.cancelled():
                self.release(caller)
            raise

    def _take(self, caller: bytes) -> None:
        self._free -= 1
        self._held[caller] += 1

    def release(self, caller: bytes) -> None:
        """Gives one of a caller's places to the next one."""
        self._free += 1
        self._held[caller] -= 1
        if not self._held[caller]:
            del self._held[caller]
        self._see(caller)
        while self._free:
            full = {holder for holder in self._held if self.has_most(holder)}
            if (found := self._waiting.pop_without(full)) is None:
                return
            waiter, turn = found
            if not turn.done():
                self._take(waiter)
                turn.set_result(None)

    def restrict(self, caller: bytes) -> None:
        """For ten minutes a caller holds no more than `most_when_shared`, also when it is alone."""
        now = time.monotonic()
        self._restricted = {other: until for other, until in self._restricted.items() if until > now}
        self._restricted[caller] = now + RESTRICTED_S

    def _see(self, caller: bytes) -> None:
        if self._most_when_shared == self._most_of_one:
            return
        self._seen[caller] = now = time.monotonic()
        self._seen.move_to_end(caller)
        while next(iter(self._seen.values())) < now - SHARED_S:
            self._seen.popitem(last=False)

    def _is_shared(self, caller: bytes) -> bool:
        """Whether another caller was here lately, or this one is restricted."""
        if self._restricted.get(caller, 0.0) > time.monotonic():
            return True
        latest = next((when for other, when in reversed(self._seen.items()) if other != caller), None)
        return latest is not None and latest > time.monotonic() - SHARED_S


class FairThreads:
    """Threads that callers take in turn. Belongs to one event loop."""

    def __init__(self, threads: Executor, count: int, most_of_one: int | None = None) -> None:
        """Takes the threads, how many there are, and how many of them one caller may have; None for all."""
        self._threads = threads
        self._places = FairSemaphore(count, most_of_one)

    async def run(self, caller: bytes, function: Callable[..., T], *arguments: object) -> T:
        """What a function returns that is called on one of the threads.

        When the wait for it is cancelled, the function goes on and its thread stays taken until it ends.
        """
        await self._places.acquire(caller)
        call = functools.partial(function, *arguments)
        future = asyncio.get_running_loop().run_in_executor(self._threads, call)
        future.add_done_callback(functools.partial(self._ended, caller))
        return await asyncio.shield(future)

    def _ended(self, caller: bytes, future: asyncio.Future[T]) -> None:
        # Retrieved, so that what a cancelled call raised is not logged: its text may hold a patient's data.
        if not future.cancelled():
            future.exception()
        self._places.release(caller)

    def shutdown(self) -> None:
        """Ends them; what was not begun is cancelled."""
        self._threads.shutdown(wait=False, cancel_futures=True)
