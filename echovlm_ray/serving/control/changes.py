"""Notifies coroutines of changes that threads make."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Changes:
    """Wakes all listeners. Create it on their event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._listeners: set[asyncio.Event] = set()

    def announce(self) -> None:
        """Announces a change. Thread-safe."""
        # A closed loop has no listeners.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    @contextmanager
    def listener(self) -> Iterator[asyncio.Event]:
        """An event that every change sets; the waiter must clear it."""
        event = asyncio.Event()
        self._listeners.add(event)
        try:
            yield event
        finally:
            self._listeners.discard(event)

    def _wake(self) -> None:
        for listener in self._listeners:
            listener.set()
