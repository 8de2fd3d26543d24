"""The two ways in which messages travel to a replica: over a local connection on one host, over gRPC between hosts."""

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

import grpc

from experts.transport.local_connection import MAX_UNANSWERED, LocalConnection, LocalConnectionError

FORWARD = "/echovlm.v1.ExpertGroup/Forward"

Received = Callable[[bytes], None]


class LinkLostError(ConnectionError):
    """The link is over. The text says why, without addresses."""


class Link(Protocol):
    """A way to a replica. One thread sends; any may wait and close."""

    def send(self, message: bytes) -> None:
        """Sends a message.

        Raises:
            LinkLostError: the link is over.
        """
        ...

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Waits until `is_done()`, which changes when a message is received.

        The caller watches the time and closes the link.

        Raises:
            LinkLostError: the link is over.
        """
        ...

    def close(self) -> None:
        """Ends the link now and releases threads that wait. Harmless when repeated."""
        ...

    @property
    def being_read(self) -> bool:
        """Whether a thread receives messages now; otherwise some may lie there."""
        ...


class LocalLink:
    """A local connection, which the waiting thread reads itself. Without a thread that waits nothing is received."""

    def __init__(self, connection: LocalConnection, received: Received) -> None:
        """Takes over a connection.

        Args:
            connection: to the replica; the memory is attached.
            received: called by a thread that waits, with each message; it may raise `LinkLostError`.
        """
        self._connection = connection
        self._received = received
        self._lock = threading.Lock()
        self._being_read = False
        # Each is changed by one thread at a time.
        self._num_sent = 0
        self._num_received = 0

    @property
    def connected(self) -> bool:
        """Whether the replica has not closed the connection."""
        return self._connection.connected

    @property
    def being_read(self) -> bool:
        """See `Link`."""
        return self._being_read

    def send(self, message: bytes) -> None:
        """See `Link`; waits for answers when too many messages have none."""
        if self._num_sent - self._num_received >= MAX_UNANSWERED:
            self.wait(lambda: self._num_sent - self._num_received < MAX_UNANSWERED)
        self._num_sent += 1
        try:
            self._connection.send(message)
        except LocalConnectionError as error:
            raise LinkLostError(str(error)) from None

    def wait(self, is_done: Callable[[], bool]) -> None:
        """See `Link`."""
        with self._lock:
            self._being_read = True
            try:
                while not is_done():
                    message = self._connection.receive()
                    self._num_received += 1
                    self._received(message)
            except LocalConnectionError as error:
                raise LinkLostError(str(error)) from None
            finally:
                self._being_read = False

    def close(self) -> None:
        """See `Link`."""
        self._connection.close()


class GrpcLink:
    """A gRPC stream whose socket gRPC's threads serve, and from which a thread of this link takes the messages."""

    def __init__(
        self, channel: grpc.Channel, received: Received, lost: Callable[["GrpcLink", str], None], name: str
    ) -> None:
        """Opens the stream.

        Args:
            channel: to the replica.
            received: called by a thread that waits, with each message; it may raise `LinkLostError`.
            lost: called by the link's thread with the reason when the stream is over.
            name: the thread's.

        Raises:
            LinkLostError: the channel was closed.
        """
        self._received = received
        self._lost = lost
        self._lock = threading.Lock()
        self._being_read = False
        self._reason: str | None = None
        # None ends the stream in both.
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        try:
            self._responses: Any = channel.stream_stream(FORWARD)(iter(self._requests.get, None))
        except ValueError:
            raise LinkLostError("the connection to a replica was closed") from None
        threading.Thread(target=self._read, daemon=True, name=name).start()

    @property
    def being_read(self) -> bool:
        """See `Link`."""
        return self._being_read

    def send(self, message: bytes) -> None:
        """See `Link`."""
        if self._reason is not None:
            raise LinkLostError(self._reason)
        self._requests.put(message)

    def wait(self, is_done: Callable[[], bool]) -> None:
        """See `Link`."""
        with self._lock:
            self._being_read = True
            try:
                while not is_done():
                    message = self._messages.get()
                    if message is None:
                        # For the next to ask.
                        self._messages.put(None)
                        raise LinkLostError(self._reason)
                    self._received(message)
            finally:
                self._being_read = False

    def close(self) -> None:
        """See `Link`."""
        self._requests.put(None)
        self._responses.cancel()

    def _read(self) -> None:
        reason = "a replica ended the stream"
        try:
            for message in self._responses:
                self._messages.put(message)
        except Exception as error:
            what = error.code().name if isinstance(error, grpc.RpcError) else type(error).__name__
            reason = f"the stream to a replica broke ({what})"
        self._reason = reason
        self._messages.put(None)
        self._lost(self, reason)
