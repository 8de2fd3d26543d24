"""The two ways in which messages travel on one stream to a replica.

On the host itself the thread that waits reads the socket, see `experts.transport.grpc_core`. To other hosts, and where
that cannot be had, threads of gRPC and one of ours do, through its public interface.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

import grpc

from experts.transport.grpc_core import DirectCall, StreamEndedError

FORWARD = "/echovlm.v1.ExpertGroup/Forward"

Received = Callable[[bytes], None]


class LinkLostError(ConnectionError):
    """The stream is over. The text says why, without addresses."""


class Link(Protocol):
    """One stream to a replica. One thread sends; any may wait and close."""

    def send(self, message: bytes) -> None:
        """Sends a message.

        Raises:
            LinkLostError: the stream is over.
        """
        ...

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Waits until `is_done()`, which changes when a message is received.

        The caller watches the time and closes the link.

        Raises:
            LinkLostError: the stream is over.
        """
        ...

    def close(self) -> None:
        """Ends the stream now and frees it; releases those that wait. Harmless when repeated."""
        ...

    @property
    def connected(self) -> bool:
        """Whether the connection stands, as far as is known."""
        ...

    @property
    def being_read(self) -> bool:
        """Whether answers are being read now; otherwise some may lie there."""
        ...


class DirectLink:
    """A stream that the waiting thread reads. A thread that never waits never receives anything."""

    def __init__(self, channel: grpc.Channel, received: Received, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        """Opens the stream, which carries the metadata; `received` is called by a thread that waits."""
        self._channel = channel
        self._call = DirectCall(channel, FORWARD, metadata)
        self._received = received
        self._readers = 0
        self._closed = False

    @property
    def connected(self) -> bool:
        """See `Link`; a broken connection is noticed only when its sockets are looked at."""
        return not self._closed and self._call.connected

    @property
    def being_read(self) -> bool:
        """See `Link`."""
        return self._readers > 0

    def send(self, message: bytes) -> None:
        """See `Link`."""
        try:
            self._call.send(message)
        except StreamEndedError as error:
            raise LinkLostError(_broke(error)) from None

    def wait(self, is_done: Callable[[], bool]) -> None:
        """See `Link`."""
        self._readers += 1
        try:
            self._call.read_until(is_done, self._received)
        except StreamEndedError as error:
            raise LinkLostError(_broke(error)) from None
        finally:
            self._readers -= 1

    def close(self) -> None:
        """See `Link`."""
        if not self._closed:
            self._closed = True
            self._call.cancel("closed")
            self._call.drain()
            self._channel.close()


class ThreadedLink:
    """A stream whose socket threads of gRPC serve, and from which one of ours takes the messages."""

    def __init__(self, channel: grpc.Channel, received: Received, lost: Callable[[str], None], name: str) -> None:
        """Opens the stream; `received` is called by a thread that waits, `lost` by ours, whose name is given."""
        self._channel = channel
        self._received = received
        self._lost = lost
        # Reentrant: what is done with a message may close the link.
        self._lock = threading.RLock()
        self._readers = 0
        self._over: str | None = None
        # None ends the stream in both.
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._responses: Any = channel.stream_stream(FORWARD)(iter(self._requests.get, None))
        threading.Thread(target=self._read, daemon=True, name=name).start()

    @property
    def connected(self) -> bool:
        """See `Link`; our thread learns at once when the connection breaks."""
        return self._over is None

    @property
    def being_read(self) -> bool:
        """See `Link`."""
        return self._readers > 0

    def send(self, message: bytes) -> None:
        """See `Link`."""
        if self._over is not None:
            raise LinkLostError(self._over)
        self._requests.put(message)

    def wait(self, is_done: Callable[[], bool]) -> None:
        """See `Link`."""
        with self._lock:
            self._readers += 1
            try:
                while not is_done():
                    message = self._messages.get()
                    if message is None:
                        # For the next to ask.
                        self._messages.put(None)
                        raise LinkLostError(self._over)
                    self._received(message)
            finally:
                self._readers -= 1

    def close(self) -> None:
        """See `Link`."""
        self._requests.put(None)
        self._channel.close()

    def _read(self) -> None:
        reason = "a replica ended the stream"
        try:
            for message in self._responses:
                self._messages.put(message)
        except grpc.RpcError as error:
            reason = f"the stream to a replica broke ({error.code().name})"
        self._over = reason
        self._messages.put(None)
        self._lost(reason)


def _broke(error: StreamEndedError) -> str:
    # The status alone: its text may hold an address.
    return f"the stream to a replica broke ({str(error).partition(':')[0]})"
