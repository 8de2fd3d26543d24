"""Ctrl-C and SIGTERM for a command that has processes to take down: once asks, twice insists."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_KILLED = 130


class StopRequest:
    """Whether somebody asked this process to stop.

    Signals are read on a thread: Python calls handlers on the main thread only, between two of its steps, and that
    thread may be inside a library for many seconds.
    """

    def __init__(self, on_first: Callable[[], None], on_second: Callable[[], None]) -> None:
        """Takes what to do at the first signal, beside noting it, and at the second, before the process ends hard."""
        self._on_first = on_first
        self._on_second = on_second
        self._event = threading.Event()

    def __call__(self) -> bool:
        """Whether it was asked."""
        return self._event.is_set()

    def wait(self) -> None:
        """Returns once it was asked."""
        self._event.wait()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listens to the signals while the block lasts; for the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        handlers = {number: signal.signal(number, _leave_to_the_thread) for number in SIGNALS}
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.close(writer)
            thread.join()
            os.close(reader)

    def _read(self, reader: int) -> None:
        while received := os.read(reader, 1):
            if received[0] not in SIGNALS:
                continue
            if not self._event.is_set():
                self._event.set()
                self._on_first()
            else:
                self._on_second()
                os._exit(EXIT_KILLED)


def _leave_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Keeps the signal from ending the process."""
