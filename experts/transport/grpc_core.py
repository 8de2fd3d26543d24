"""Streams without threads between caller and socket: all that we use of grpcio beyond its public interface.

The public interfaces hand every message from thread to thread: two hops in the caller, one in the server. Where a
thread wakes on another core each costs about 25 µs. Here the thread that asks writes to the socket and reads from it
itself, on the same gRPC core. A round trip of a small message over a Unix socket took 36 µs, where grpc.aio and the
synchronous client took 119 (grpcio 1.85.1, two cores, event engine off); two processes that wake each other through
an eventfd took 40 to 53.

The names below are those of grpcio 1.85, which is pinned. `missing` says what another version lacks; callers then use
the public interfaces.
"""

import logging
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grpc
from grpc._cython import cygrpc

logger = logging.getLogger(__name__)

# With this many answers waiting for a caller that does not read, it is not read either.
MAX_UNSENT = 8
_NO_FLAGS = 0
_NAMES = (
    "CompletionQueue",
    "Server",
    "SegregatedCall",
    "SendInitialMetadataOperation",
    "SendMessageOperation",
    "SendStatusFromServerOperation",
    "ReceiveInitialMetadataOperation",
    "ReceiveMessageOperation",
    "ReceiveStatusOnClientOperation",
    "ReceiveCloseOnServerOperation",
)


def missing() -> str | None:
    """Why this module cannot be used here, or None."""
    if not sys.platform.startswith("linux"):
        return "it needs Linux"
    lacking = [name for name in _NAMES if not hasattr(cygrpc, name)]
    if lacking:
        return f"grpcio {grpc.__version__} has no {', '.join(lacking)}"
    return None


class StreamEndedError(ConnectionError):
    """The stream is over. The text is the status that it ended with."""


_STATUS_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class DirectCall:
    """The calling end of one stream.

    May be used from any thread, by one at a time: the others wait, save in `cancel`, which releases one that waits for
    messages.
    """

    def __init__(self, channel: grpc.Channel, method: str, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        """Opens the stream; fails later, in `receive`, when there is no server.

        Args:
            channel: without interceptors.
            method: its full name, as in `/package.Service/Method`.
            metadata: what the stream carries.
        """
        # Reentrant: what is done with a message may end the stream.
        self._lock = threading.RLock()
        self._received: deque[bytes] = deque()
        self._sending = False
        self._ended: str | None = None
        beginning = (
            ((cygrpc.SendInitialMetadataOperation(metadata or None, _NO_FLAGS),), "begin"),
            ((cygrpc.ReceiveStatusOnClientOperation(_NO_FLAGS),), "status"),
            ((cygrpc.ReceiveInitialMetadataOperation(_NO_FLAGS),), "begin"),
            ((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), "receive"),
        )
        # Operations that were started and have not come back. Asking for an event when none is due is fatal.
        self._due = len(beginning)
        # A channel closes when it is no longer referred to.
        self._owner = channel
        self._channel: Any = channel._channel
        self._call: Any = self._channel.segregated_call(
            _NO_FLAGS, method.encode(), None, None, None, None, beginning, None, None
        )

    @property
    def connected(self) -> bool:
        """Whether the connection stands, as far as is known without looking for news."""
        try:
            state = self._channel.check_connectivity_state(False)
        except ValueError:
            return False
        return bool(state == cygrpc.ConnectivityState.ready)

    def send(self, message: bytes) -> None:
        """Writes a message; what does not fit into the socket goes out while this or another call waits.

        Raises:
            StreamEndedError: nothing can be sent any more.
        """
        with self._lock:
            while self._sending and self._ended is None:
                self._next_event()
            if self._ended is not None:
                raise StreamEndedError(self._ended)
            if not self._call.operate((cygrpc.SendMessageOperation(message, _NO_FLAGS),), "send"):
                raise StreamEndedError("the stream was cancelled")
            self._due += 1
            self._sending = True

    def receive(self) -> bytes:
        """Waits for the next message.

        Raises:
            StreamEndedError: there will be none.
        """
        with self._lock:
            while not self._received:
                if self._ended is not None:
                    raise StreamEndedError(self._ended)
                self._next_event()
            return self._received.popleft()

    def read_until(self, is_done: Callable[[], bool], received: Callable[[bytes], None]) -> None:
        """Waits for messages and hands them over, until `is_done()`.

        There is no other reader meanwhile, so what is done is not missed by the next to ask.

        Raises:
            StreamEndedError: it will not be done.
        """
        with self._lock:
            while not is_done():
                received(self.receive())

    def cancel(self, reason: str) -> None:
        """Ends the stream now; harmless when it has ended."""
        self._call.cancel(grpc.StatusCode.CANCELLED.value[0], reason)

    def drain(self) -> None:
        """Frees what the stream held; to be called after it was cancelled or has ended."""
        with self._lock:
            while self._due:
                self._next_event()

    def _next_event(self) -> None:
        try:
            event = self._call.next_event()
        except BaseException:
            # A signal's handler raised; grpcio has then freed the call.
            self._due = 0
            self._ended = "interrupted"
            raise
        self._due -= 1
        match event.tag:
            case "send":
                self._sending = False
            case "receive":
                message = event.batch_operations[0].message()
                if message is not None:
                    self._received.append(message)
                    if self._call.operate((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), "receive"):
                        self._due += 1
            case "status":
                status = event.batch_operations[0]
                code = _STATUS_NAMES.get(status.code(), status.code())
                self._ended = f"{code}: {status.details()}" if status.details() else str(code)


class StreamHandler(Protocol):
    """What a server does with one stream. Called from the server's thread only."""

    def received(self, message: bytes) -> None:
        """A message came; exactly one answer must be sent for it, now or later, from any thread."""
        ...

    def closed(self) -> None:
        """The stream is over; answers are dropped from now on."""
        ...


class ServerStream:
    """The serving end of one stream."""

    def __init__(self, server: "DirectServer", call: Any) -> None:
        """Made by the server."""
        self.handler: StreamHandler | None = None
        self._server = server
        self._call = call
        self._lock = threading.Lock()
        self._unsent: deque[bytes] = deque()
        self._sending = False
        self._owed = 0
        self._reading = False
        self._no_more_messages = False
        # What the stream should end with when the message that is being sent is out.
        self._ending: tuple[grpc.StatusCode, str] | None = None
        self._ended = False

    def answer(self, message: bytes) -> None:
        """Sends the answer to one message; from any thread. Dropped when the stream is over."""
        with self._lock:
            self._owed -= 1
            if self._ended:
                return
            if self._sending:
                self._unsent.append(message)
                return
            self._send(message)

    def end(self, code: grpc.StatusCode, reason: str) -> None:
        """Ends the stream after what was sent so far; nothing is sent or read after it."""
        with self._lock:
            if self._sending:
                self._ending = code, reason
            else:
                self._end(code, reason)

    def refuse(self, code: grpc.StatusCode, reason: str) -> None:
        """Ends the stream, of which no message is read; called by the server instead of `begin`."""
        self.handler = _Refused()
        with self._lock:
            self._start((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), self._on_close)
            self._start((cygrpc.SendInitialMetadataOperation((), _NO_FLAGS),), _ignore)
            self._end(code, reason)

    def begin(self, handler: StreamHandler) -> None:
        """Starts reading; called by the server."""
        self.handler = handler
        with self._lock:
            self._start((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), self._on_close)
            self._start((cygrpc.SendInitialMetadataOperation((), _NO_FLAGS),), _ignore)
            self._read()

    def _read(self) -> None:
        if self._reading or self._ended or self._ending or self._no_more_messages:
            return
        if len(self._unsent) < MAX_UNSENT:
            self._reading = self._start((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), self._on_message)

    def _send(self, message: bytes) -> None:
        self._sending = self._start((cygrpc.SendMessageOperation(message, _NO_FLAGS),), self._on_sent)

    def _end(self, code: grpc.StatusCode, reason: str) -> None:
        if self._ended:
            return
        self._ended = True
        self._unsent.clear()
        status = cygrpc.SendStatusFromServerOperation((), code.value[0], reason.encode(), _NO_FLAGS)
        self._start((status,), _ignore)

    def _start(self, operations: Sequence[Any], done: Callable[[Any], None]) -> bool:
        return self._server.start(self._call, operations, done)

    def _on_message(self, event: Any) -> None:
        message = event.batch_operations[0].message()
        with self._lock:
            self._reading = False
            if message is None:
                self._no_more_messages = True
                self._end_if_done()
                return
            if self._ended:
                return
            self._owed += 1
        assert self.handler is not None
        self.handler.received(message)
        with self._lock:
            self._read()

    def _on_sent(self, event: Any) -> None:
        with self._lock:
            self._sending = False
            if self._unsent and not self._ended:
                self._send(self._unsent.popleft())
            elif self._ending is not None:
                self._end(*self._ending)
            self._read()
            self._end_if_done()

    def _on_close(self, event: Any) -> None:
        with self._lock:
            self._ended = True
            self._unsent.clear()
        assert self.handler is not None
        self.handler.closed()

    def _end_if_done(self) -> None:
        if self._no_more_messages and not self._owed and not self._sending:
            self._end(grpc.StatusCode.OK, "")


class DirectServer:
    """Serves one bidirectional method on one address, all of it from one thread of its own."""

    def __init__(
        self,
        address: str,
        method: str,
        accept: Callable[[ServerStream], StreamHandler],
        options: Sequence[tuple[str, int]] = (),
        admits: Callable[[Sequence[tuple[str, str | bytes]]], bool] | None = None,
    ) -> None:
        """Listens and starts the thread.

        Args:
            address: as gRPC writes them, `unix-abstract:name` for instance.
            method: its full name; calls of any other end `UNIMPLEMENTED`.
            accept: makes the handler of a new stream.
            options: of the gRPC server.
            admits: whether a stream with such metadata is served; others end `UNAUTHENTICATED` before a message of
                theirs is read. None admits all.

        Raises:
            OSError: the address cannot be listened on.
        """
        self._method = method.encode()
        self._accept = accept
        self._admits = admits
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(tuple(options), False)
        self._server.register_completion_queue(self._queue)
        try:
            listening = bool(self._server.add_http2_port(address.encode()))
        except RuntimeError:
            listening = False
        if not listening:
            raise OSError(f"cannot listen on {address}")
        self._lock = threading.Lock()
        self._stopping = False
        # Operations that were started and have not come back.
        self._due = 0
        self._server.start()
        self._await_call()
        self._thread = threading.Thread(target=self._serve, daemon=True, name=f"doorbell {address}")
        self._thread.start()

    def start(self, call: Any, operations: Sequence[Any], done: Callable[[Any], None]) -> bool:
        """Starts a batch of operations of a call; False when the server is stopping."""
        with self._lock:
            if self._stopping:
                return False
            call.start_server_batch(operations, done)
            self._due += 1
            return True

    def stop(self) -> None:
        """Cancels all streams and waits for the thread; harmless when repeated."""
        with self._lock:
            if not self._stopping:
                self._stopping = True
                self._due += 1
                self._server.shutdown(self._queue, _ignore)
                self._server.cancel_all_calls()
        self._thread.join()

    def _await_call(self) -> None:
        with self._lock:
            if not self._stopping:
                self._server.request_call(self._queue, self._queue, self._on_call)
                self._due += 1

    def _serve(self) -> None:
        while True:
            event = self._queue.poll()
            with self._lock:
                self._due -= 1
                over = self._stopping and not self._due
            try:
                event.tag(event)
            except Exception as error:
                # Its places in the code, not its text: that may show what was computed.
                places = "".join(traceback.format_tb(error.__traceback__))
                logger.error("an event of a stream was not handled: %s\n%s", type(error).__name__, places)
            # An event that holds a finished call makes the next poll spin.
            event = None
            if over:
                self._server.destroy()
                self._queue.shutdown()
                return

    def _on_call(self, event: Any) -> None:
        if not event.success:
            return
        self._await_call()
        stream = ServerStream(self, event.call)
        if self._admits is not None and not self._admits(event.invocation_metadata):
            stream.refuse(grpc.StatusCode.UNAUTHENTICATED, "the call does not carry this system's secret")
        elif event.call_details.method == self._method:
            stream.begin(self._accept(stream))
        else:
            stream.refuse(grpc.StatusCode.UNIMPLEMENTED, "this socket serves one method only")


class _Refused:
    def received(self, message: bytes) -> None:
        return

    def closed(self) -> None:
        return


def _ignore(event: Any) -> None:
    return
