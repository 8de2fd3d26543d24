"""The token loop for callers on the same host: a Unix socket that only says what is ready, and memory that they share.

The socket lies in a folder that only this process's user may enter, so the kernel refuses every other user. A stream
must carry the system's secret before it is read, and its first message must show memory that belongs to this process's
user.
"""

import errno
import logging
import secrets
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc

from experts.errors import InvalidTensorError
from experts.exchanges import Exchanges
from experts.private_folder import MAX_SOCKET_PATH, private_folder
from experts.transport import wire
from experts.transport.attached_memory import AttachedMemory
from experts.transport.grpc_core import DirectServer, ServerStream, missing
from experts.transport.secret import NO_SECRET, SystemSecret
from protos import expert_pb2

logger = logging.getLogger(__name__)

FORWARD = "/echovlm.v1.ExpertGroup/Forward"
# The tensors lie in shared memory; what does not fit there travels in the messages of this socket too.
_MAX_MESSAGE_BYTES = 256 * 1024 * 1024
# Without memory to share a stream says nothing but that it has some.
_MAX_ATTACH_BYTES = 1024
# A socket that is older and that has no listener was left by a process that was killed.
_LEFT_BEHIND_S = 60.0
_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # No message is compressed, so none can become larger than it came.
    ("grpc.compression_enabled_algorithms_bitset", 1),
)


class Doorbell:
    """Serves exchanges on a Unix socket, from a thread of its own.

    Attributes:
        address: where callers reach it, as gRPC writes addresses; empty where it cannot be offered.
    """

    def __init__(
        self,
        exchanges: Exchanges,
        pool: ThreadPoolExecutor,
        *,
        instance: str,
        inline_multiply_adds: int,
        secret: SystemSecret = NO_SECRET,
    ) -> None:
        """Listens.

        Args:
            exchanges: computes and counts.
            pool: computes what is large, or comes while something else is computed.
            instance: tells this process from others.
            inline_multiply_adds: an exchange of at most this many is computed by the thread that reads the socket when
                nothing else is under way.
            secret: what every stream must carry; without one, every process of this user is served.
        """
        self.address = ""
        self._exchanges = exchanges
        self._pool = pool
        self._instance = instance
        self._inline_multiply_adds = inline_multiply_adds
        self._server: DirectServer | None = None
        self._path: Path | None = None
        if reason := missing():
            logger.warning("no shared memory for callers on this host, tensors travel in the messages: %s", reason)
            return
        admits = secret.matches if secret.text else None
        try:
            self._path = _new_socket_path()
            address = f"unix:{self._path}"
            self._server = DirectServer(address, FORWARD, self._accept, _OPTIONS, admits)
        except (OSError, ValueError) as error:
            logger.warning("no shared memory for callers on this host, tensors travel in the messages: %s", error)
            return
        self.address = address

    def stop(self) -> None:
        """Cancels all streams; for after the exchanges under way have ended. Harmless when repeated."""
        if self._server is not None:
            self._server.stop()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _accept(self, stream: ServerStream) -> "_Caller":
        return _Caller(stream, self._exchanges, self._pool, self._instance, self._inline_multiply_adds)


def _new_socket_path() -> Path:
    """A free name in this user's own folder, from which what killed processes left is removed.

    Raises:
        OSError: the folder cannot be written.
        ValueError: there is no such folder.
    """
    room = len(f"/sockets/{secrets.token_hex(8)}")
    folder = private_folder(longest=MAX_SOCKET_PATH - room) / "sockets"
    folder.mkdir(mode=0o700, exist_ok=True)
    for path in folder.iterdir():
        with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            # A young one may be about to listen.
            if time.time() - path.stat().st_mtime > _LEFT_BEHIND_S:
                probe.settimeout(0)
                if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
                    path.unlink()
    return folder / secrets.token_hex(8)


class _Caller:
    """One caller's stream. Used by the socket's thread."""

    def __init__(
        self,
        stream: ServerStream,
        exchanges: Exchanges,
        pool: ThreadPoolExecutor,
        instance: str,
        inline_multiply_adds: int,
    ) -> None:
        self._stream = stream
        self._exchanges = exchanges
        self._pool = pool
        self._instance = instance
        self._inline_multiply_adds = inline_multiply_adds
        self._memory: AttachedMemory | None = None
        self._waiting: set[Future[None]] = set()

    def received(self, message: bytes) -> None:
        """An exchange, or memory to share; see `StreamHandler`."""
        if self._memory is None and len(message) > _MAX_ATTACH_BYTES:
            self._stream.end(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a stream must have attach alone")
            return
        try:
            request, data = wire.parse(expert_pb2.ForwardRequest, message)
        except wire.DecodeError:
            self._stream.end(grpc.StatusCode.INVALID_ARGUMENT, "this is no ForwardRequest")
            return
        if self._memory is None or request.HasField("attach"):
            self._attach(request)
            return
        before = self._exchanges.begin()
        if before is None:
            self._stream.answer(self._exchanges.refusal(request))
            return
        cost = self._exchanges.multiply_adds(request)
        if before == 0 and cost is not None and cost <= self._inline_multiply_adds:
            try:
                answer = self._exchanges.compute(request, data, self._memory)
            finally:
                self._exchanges.end()
            self._stream.answer(answer)
            return
        exchange = self._pool.submit(self._exchange, request, data)
        self._waiting.add(exchange)
        exchange.add_done_callback(self._ended)

    def closed(self) -> None:
        """What was not begun never is: the caller sends it elsewhere."""
        for exchange in list(self._waiting):
            exchange.cancel()
        self._memory = None

    def _exchange(self, request: expert_pb2.ForwardRequest, data: memoryview | None) -> None:
        try:
            answer = self._exchanges.compute(request, data, self._memory)
        finally:
            # Before the answer, so that the next exchange does not find this one under way.
            self._exchanges.end()
        self._stream.answer(answer)

    def _ended(self, exchange: Future[None]) -> None:
        self._waiting.discard(exchange)
        if exchange.cancelled():
            self._exchanges.end()

    def _attach(self, request: expert_pb2.ForwardRequest) -> None:
        try:
            if self._memory is not None:
                raise InvalidTensorError("this stream has shared memory already")
            if not request.HasField("attach"):
                raise InvalidTensorError("the first message of a stream on this socket must have attach")
            self._memory = AttachedMemory(request.attach)
        except Exception as error:
            self._stream.answer(self._exchanges.failure(request, error))
            self._stream.end(grpc.StatusCode.FAILED_PRECONDITION, "no memory is shared: use another address")
            return
        response = expert_pb2.ForwardResponse(correlation_id=request.correlation_id, attached=self._instance)
        self._stream.answer(response.SerializeToString())
