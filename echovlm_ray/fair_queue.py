"""Fair queues: callers are served in turn, so that one caller's many items do not delay another's."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First in, first out for the items of one caller; among callers, round robin."""

    def __init__(self) -> None:
        self._items: OrderedDict[bytes, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(items) for items in self._items.values())

    def append(self, caller: bytes, item: T) -> None:
        """Adds an item behind those of its caller."""
        self._items.setdefault(caller, deque()).append(item)

    def first(self) -> T:
        """The item that `pop` would take; the queue must not be empty."""
        return next(iter(self._items.values()))[0]

    def pop(self) -> T:
        """Takes the next item, and puts its caller behind all others; the queue must not be empty."""
        caller, items = next(iter(self._items.items()))
        item = items.popleft()
        if items:
            self._items.move_to_end(caller)
        else:
            del self._items[caller]
        return item

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


class FairSemaphore:
    """A number of places that callers take in turn. Belongs to one event loop."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()

    @asynccontextmanager
    async def place(self, caller: bytes) -> AsyncIterator[None]:
        """Waits for a place and holds it for the block."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(caller)
        try:
            yield
        finally:
            self._release()

    async def _wait(self, caller: bytes) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(caller, turn)
        try:
            await turn
        except asyncio.CancelledError:
            # Cancelled in the moment in which it got the place, which is then the next one's.
            if not self._waiting.discard(caller, turn) and not turn.cancelled():
                self._release()
            raise

    def _release(self) -> None:
        while self._waiting:
            turn = self._waiting.pop()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
