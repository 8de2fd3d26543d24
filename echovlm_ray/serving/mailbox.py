"""From the engine's thread to the event loop: the outputs of a step wake the loop once."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Letter = TypeVar("Letter")


class Mailbox(Generic[Letter]):
    """Puts what other threads say into queues of an event loop, in order, when `wake` is called."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """`loop` is the one on which the queues are read."""
        self._loop = loop
        self._letters: deque[tuple[asyncio.Queue[Letter], Letter]] = deque()
        self._woken = False

    def sink(self, queue: "asyncio.Queue[Letter]") -> Callable[[Letter], None]:
        """What another thread calls with each letter for a queue without a limit."""

        def put(letter: Letter) -> None:
            # A closed loop means that there is no reader left.
            if self._loop.is_closed():
                return
            self._letters.append((queue, letter))

        return put

    def wake(self) -> None:
        """Has the loop deliver all letters so far; may be called from any thread, and costs nothing without letters."""
        if self._letters and not self._woken and not self._loop.is_closed():
            self._woken = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # First, or a letter that comes now could be left lying.
        self._woken = False
        while self._letters:
            queue, letter = self._letters.popleft()
            queue.put_nowait(letter)
