"""Fair queues: callers take turns, so that one with many items does not delay another one's single item."""

import asyncio
import functools
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Container
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


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

    def __init__(self, places: int, most_of_one: int | None = None) -> None:
        """Takes the number of permits, and the limit for one caller; None for no limit."""
        self._free = places
        self._most_of_one = places if most_of_one is None else most_of_one
        self._held: Counter[bytes] = Counter()
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()

    def has_most(self, caller: bytes) -> bool:
        """Whether a caller has reached its limit."""
        return self._held[caller] >= self._most_of_one

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
        """Waits for a permit."""
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
        while self._free:
            full = {holder for holder, held in self._held.items() if held >= self._most_of_one}
            if (found := self._waiting.pop_without(full)) is None:
                return
            waiter, turn = found
            if not turn.done():
                self._take(waiter)
                turn.set_result(None)


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
