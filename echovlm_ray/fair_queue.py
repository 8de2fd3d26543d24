"""Fair queues: callers take turns, so that one with many items does not delay another one's single item."""

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
    """FIFO for the items of one caller, round robin among callers."""

    def __init__(self) -> None:
        self._items: OrderedDict[bytes, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(items) for items in self._items.values())

    @property
    def num_callers(self) -> int:
        """The number of callers with items."""
        return len(self._items)

    def count(self, caller: bytes) -> int:
        """The number of a caller's items."""
        return len(self._items.get(caller, ()))

    def append(self, caller: bytes, item: T) -> None:
        """Adds an item after the caller's other items."""
        self._items.setdefault(caller, deque()).append(item)

    def first(self) -> T:
        """The item that `pop` would return. The queue must not be empty."""
        return next(iter(self._items.values()))[0]

    def pop(self) -> T:
        """Removes and returns the next item, and moves its caller to the end. The queue must not be empty."""
        return self._pop(next(iter(self._items)))

    def pop_without(self, callers: Container[bytes]) -> tuple[bytes, T] | None:
        """Like `pop`, but skips some callers, whose turn stays. Returns the caller and the item, or None."""
        caller = next((caller for caller in self._items if caller not in callers), None)
        return None if caller is None else (caller, self._pop(caller))

    def discard(self, caller: bytes, item: T) -> bool:
        """Removes an item. Returns whether it was in the queue."""
        items = self._items.get(caller)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._items[caller]
        return True

    def clear(self) -> None:
        """Removes all items."""
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
    """A semaphore whose permits callers get in turn. For one event loop."""

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
        """Whether a caller would have to wait."""
        return not self._free or self.has_most(caller)

    @asynccontextmanager
    async def place(self, caller: bytes) -> AsyncIterator[None]:
        """Waits for a permit and holds it within the block."""
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
            # Cancelled just when it got the permit, which goes to the next caller.
            if not self._waiting.discard(caller, turn) and not turn.cancelled():
                self.release(caller)
            raise

    def _take(self, caller: bytes) -> None:
        self._free -= 1
        self._held[caller] += 1

    def release(self, caller: bytes) -> None:
        """Releases a permit of a caller."""
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
    """A thread pool that callers use in turn. For one event loop."""

    def __init__(self, threads: Executor, count: int, most_of_one: int | None = None) -> None:
        """Takes the pool, its number of threads, and the limit for one caller; None for no limit."""
        self._threads = threads
        self._places = FairSemaphore(count, most_of_one)

    async def run(self, caller: bytes, function: Callable[..., T], *arguments: object) -> T:
        """Runs a function on one of the threads and returns its result.

        If the wait is cancelled, the function continues and its thread stays occupied until it ends.
        """
        await self._places.acquire(caller)
        call = functools.partial(function, *arguments)
        future = asyncio.get_running_loop().run_in_executor(self._threads, call)
        future.add_done_callback(functools.partial(self._ended, caller))
        return await asyncio.shield(future)

    def _ended(self, caller: bytes, future: asyncio.Future[T]) -> None:
        # Retrieved, so that the exception of a cancelled call is not logged: its text may contain a patient's data.
        if not future.cancelled():
            future.exception()
        self._places.release(caller)

    def shutdown(self) -> None:
        """Shuts the pool down; pending calls are cancelled."""
        self._threads.shutdown(wait=False, cancel_futures=True)
