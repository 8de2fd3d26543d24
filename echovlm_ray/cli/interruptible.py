"""Makes Ctrl-C safe for a command that reads a stream: it takes effect between two messages."""

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TypeVar

# A signal just before the main thread begins to wait does not wake it.
NOTICE_S = 0.1

Message = TypeVar("Message")


@contextmanager
def interruptible(messages: Iterator[Message]) -> Iterator[Iterator[Message]]:
    """Yields an iterator over the same messages, which Ctrl-C interrupts. For the main thread.

    Python raises `KeyboardInterrupt` after any instruction of the main thread. Inside gRPC that leaves a lock locked,
    about once in a thousand times while messages arrive, and all later uses of the channel block. So another thread
    waits for gRPC here, and only waiting for that thread is interrupted. A second Ctrl-C interrupts as usual.

    Args:
        messages: the messages; at the end of the block another thread may still be waiting for the next one.

    The iterator raises the errors of `messages`, and `KeyboardInterrupt`.
    """
    received = _Received(messages)
    before = signal.signal(signal.SIGINT, received.interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
        received.end()


class _Received(Iterator[Message]):
    def __init__(self, messages: Iterator[Message]) -> None:
        self._messages = messages
        # SimpleQueue, because a signal handler may put into it at any point of the interrupted code.
        self._wanted: SimpleQueue[bool] = SimpleQueue()
        self._arrived: SimpleQueue[Future[Message]] = SimpleQueue()
        self._interrupted = False
        threading.Thread(target=self._fetch, name="messages", daemon=True).start()

    def __next__(self) -> Message:
        self._wanted.put(True)
        while True:
            try:
                arrival = self._arrived.get(timeout=NOTICE_S)
            except Empty:
                continue
            return arrival.result()

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        interruption: Future[Message] = Future()
        interruption.set_exception(KeyboardInterrupt())
        self._arrived.put(interruption)

    def end(self) -> None:
        self._wanted.put(False)

    def _fetch(self) -> None:
        while self._wanted.get():
            arrival: Future[Message] = Future()
            try:
                arrival.set_result(next(self._messages))
            except BaseException as error:
                arrival.set_exception(error)
            self._arrived.put(arrival)
