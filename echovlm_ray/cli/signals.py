"""Ctrl-C and SIGTERM for a command that must stop other processes: the first is orderly, the second immediate."""

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

    Signals are read on a thread, because Python calls handlers only on the main thread between two instructions, and
    that thread may be inside a library for many seconds.
    """

    def __init__(self, on_first: Callable[[], None], on_second: Callable[[], None]) -> None:
        """Takes callbacks for the first signal, and for the second one before the process exits immediately."""
        self._on_first = on_first
        self._on_second = on_second
        self._event = threading.Event()
        self._asking = threading.Lock()

    def __call__(self) -> bool:
        """Whether a stop was requested."""
        return self._event.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits for a request or the timeout, and returns whether a stop was requested."""
        return self._event.wait(timeout_s)

    def ask(self) -> None:
        """Requests a stop, like the first signal. Idempotent."""
        with self._asking:
            if self._event.is_set():
                return
            self._event.set()
        self._on_first()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals within the block. For the main thread."""
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
        """Reads from a supervisor within the block: one byte for each request, end of file when it has died.

        Direct signals to this process, any number, only request a stop: a service manager sends its signal to this
        process and to the supervisor, which forwards it.
        """
        handlers = {number: signal.signal(number, lambda *_: self._ask_apart()) for number in SIGNALS}
        threading.Thread(target=self._follow, args=(supervisor,), name="supervisor", daemon=True).start()
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _ask_apart(self) -> None:
        # Not inside the handler: the interrupted code may hold a lock that is needed here.
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
    """Does nothing; prevents the default action of the signal."""
