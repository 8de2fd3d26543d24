"""The two transports to a replica: a Unix socket on the same host, and a gRPC stream between hosts."""

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

import grpc

from experts.transport.local_connection import MAX_UNANSWERED, LocalConnection, LocalConnectionError

FORWARD = "/echovlm.v1.ExpertGroup/Forward"

Received = Callable[[bytes], None]


class LinkLostError(ConnectionError):
    """The link has ended. The text has the reason, without addresses."""


class Link(Protocol):
    """A transport to a replica. One thread sends; any thread may wait and close."""

    def send(self, message: bytes) -> None:
        """Sends a message.

        Raises:
            LinkLostError: the link has ended.
        """
        ...

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Waits until `is_done()`, which changes when a message is received.

        There is no timeout here: the caller closes the link.

        Raises:
            LinkLostError: the link has ended.
        """
        ...

    def close(self) -> None:
        """Ends the link and wakes waiting threads. Idempotent."""
        ...

    @property
    def being_read(self) -> bool:
        """Whether a thread is receiving messages; if not, there may be unread ones."""
        ...


class LocalLink:
    """A local connection that the waiting thread reads. Without a waiting thread nothing is received."""

    def __init__(self, connection: LocalConnection, received: Received) -> None:
        """Takes ownership of a connection.

        Args:
            connection: the connection to the replica, with the shared memory attached.
            received: called with each message by a waiting thread; may raise `LinkLostError`.
        """
        self._connection = connection
        self._received = received
        self._lock = threading.Lock()
        self._being_read = False
        # Each counter is changed by one thread at a time.
        self._num_sent = 0
        self._num_received = 0

    @property
    def connected(self) -> bool:
        """Whether the connection is open."""
        return self._connection.connected

    @property
    def being_read(self) -> bool:
        """See `Link`."""
        return self._being_read

    def send(self, message: bytes) -> None:
        """Sends a message; first waits for answers if too many are outstanding."""
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
    """A gRPC stream; a thread of this link receives its messages."""

    def __init__(
        self, channel: grpc.Channel, received: Received, lost: Callable[["GrpcLink", str], None], name: str
    ) -> None:
        """Opens the stream.

        Args:
            channel: to the replica.
            received: called with each message by a waiting thread; may raise `LinkLostError`.
            lost: called by the link's thread with the reason when the stream has ended.
            name: the thread's.

        Raises:
            LinkLostError: the channel was closed.
        """
        self._received = received
        self._lost = lost
        self._lock = threading.Lock()
        self._being_read = False
        self._reason: str | None = None
        # None ends both queues.
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
                        # For other waiting threads.
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
