"""Ctrl-C and SIGTERM for a command that must stop other processes: the first stops in order, the second at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_KILLED = 130


class StopRequest:
    """Whether this process was asked to stop.

    Signals are read on a thread: Python calls handlers on the main thread only, between two of its steps, and that
    thread may be inside a library for many seconds.
    """

    def __init__(self, on_first: Callable[[], None], on_second: Callable[[], None]) -> None:
        """Takes what to do at the first signal, beside noting it, and at the second, before the process ends hard."""
        self._on_first = on_first
        self._on_second = on_second
        self._event = threading.Event()
        self._asking = threading.Lock()

    def __call__(self) -> bool:
        """Whether it was asked."""
        return self._event.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Returns once it was asked, or after so many seconds; whether it was asked."""
        return self._event.wait(timeout_s)

    def ask(self) -> None:
        """Asks, as the first signal does; harmless when repeated."""
        with self._asking:
            if self._event.is_set():
                return
            self._event.set()
        self._on_first()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals while the block lasts; for the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        handlers = {number: signal.signal(number, _leave_to_the_thread) for number in SIGNALS}
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._read, args=(reader, SIGNALS), name="signals", daemon=True)
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

    @contextmanager
    def following(self, supervisor: int) -> Iterator[None]:
        """Reads from a supervisor while the block lasts: a byte for each request, the end of the file when it has died.

        Signals that reach this process itself only ask, however many come: a service manager sends its signal to this
        process and to the supervisor, which passes it on.
        """
        handlers = {number: signal.signal(number, lambda *_: self._ask_apart()) for number in SIGNALS}
        threading.Thread(target=self._follow, args=(supervisor,), name="supervisor", daemon=True).start()
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _ask_apart(self) -> None:
        # Not inside the handler: what it interrupted may hold a lock that asking needs.
        threading.Thread(target=self.ask, daemon=True).start()

    def _follow(self, supervisor: int) -> None:
        self._read(supervisor, None)
        self.ask()

    def _read(self, reader: int, wishes: tuple[int, ...] | None) -> None:
        asked = False
        while received := os.read(reader, 1):
            if wishes is not None and received[0] not in wishes:
                continue
            if not asked:
                asked = True
                self.ask()
            else:
                self._on_second()
                os._exit(EXIT_KILLED)


def _leave_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Keeps the signal from ending the process."""
