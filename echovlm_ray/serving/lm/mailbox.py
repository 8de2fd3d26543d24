"""Passes outputs from the engine's thread to the event loop, with one wake-up per step."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """Moves items from other threads to queues of an event loop, in order, when `wake` is called."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """`loop` is the event loop of the queues' readers."""
        self._loop = loop
        self._items: deque[tuple[asyncio.Queue[Item], Item]] = deque()
        self._woken = False

    def sink(self, queue: "asyncio.Queue[Item]") -> Callable[[Item], None]:
        """A function with which another thread adds items to an unbounded queue."""

        def put(item: Item) -> None:
            # A closed loop means that there is no reader left.
            if self._loop.is_closed():
                return
            self._items.append((queue, item))

        return put

    def wake(self) -> None:
        """Makes the loop deliver all items so far. Thread-safe, and free without items."""
        if self._items and not self._woken and not self._loop.is_closed():
            self._woken = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # First, or an item that comes now could be left behind.
        self._woken = False
        while self._items:
            queue, item = self._items.popleft()
            queue.put_nowait(item)
