"""Serves expert calls on the same host: a Unix socket says what to compute, and shared memory has the tensors.

The socket lies in a folder that only this process's user may enter, and the kernel says of which user a caller is. The
first packet carries the system's secret and the caller's memory; until it is accepted nothing else is read.
"""

import errno
import logging
import os
import secrets
import socket
import threading
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from experts.errors import InvalidTensorError
from experts.private_folder import MAX_SOCKET_PATH, private_folder
from experts.transport.attached_memory import AttachedMemory, AttachError
from experts.transport.expert_calls import ExpertCalls
from experts.transport.local_connection import (
    MAX_PACKET_BYTES,
    LocalConnection,
    LocalConnectionError,
    listen_on,
    unsupported,
)
from experts.transport.secret import NO_SECRET, SECRET_KEY, SystemSecret
from protos import expert_pb2

logger = logging.getLogger(__name__)

# A socket that is older and that has no listener was left by a process that was killed.
_LEFT_BEHIND_S = 60.0
# A caller that has connected must send its first packet within this time.
_ATTACH_TIMEOUT_S = 5.0
# Each has a thread. A system has one or two routers, and a few tools.
MAX_CALLERS = 64
# How long to wait after a connection could not be accepted, because no file descriptor was free for example.
_ACCEPT_RETRY_S = 0.1
# Of an answer that is too long for a packet.
_MAX_ERROR_CHARACTERS = 1000


class LocalTransportServer:
    """Serves expert calls on a Unix socket, from one thread for each caller.

    Attributes:
        socket_path: where callers reach it; empty where it cannot be offered.
    """

    def __init__(
        self,
        calls: ExpertCalls,
        pool: ThreadPoolExecutor,
        *,
        instance: str,
        inline_multiply_adds: int,
        secret: SystemSecret = NO_SECRET,
    ) -> None:
        """Listens.

        Args:
            calls: computes and counts.
            pool: computes what is large, or comes while something else is computed.
            instance: tells this process from others.
            inline_multiply_adds: a call of at most this many is computed by the thread that received it when nothing
                else is under way.
            secret: what a caller's first packet must carry; without one, every process of this user is served.
        """
        self.socket_path = ""
        self._calls = calls
        self._pool = pool
        self._instance = instance
        self._inline_multiply_adds = inline_multiply_adds
        self._secret = secret
        self._listening: socket.socket | None = None
        self._accepting: threading.Thread | None = None
        self._lock = threading.Lock()
        self._callers: dict[threading.Thread, LocalConnection] = {}
        self._stopping = False
        if reason := unsupported():
            logger.warning("no shared memory for callers on this host, tensors travel in the messages: %s", reason)
            return
        try:
            path = _new_socket_path()
            self._listening = listen_on(path)
        except (OSError, ValueError) as error:
            logger.warning("no shared memory for callers on this host, tensors travel in the messages: %s", error)
            return
        self.socket_path = path
        self._accepting = threading.Thread(target=self._accept, daemon=True, name="local-callers")
        self._accepting.start()

    def stop(self) -> None:
        """Ends all connections and threads; for after the calls under way have ended. Harmless when repeated."""
        if self._listening is None or self._accepting is None:
            return
        with self._lock:
            self._stopping = True
            callers = dict(self._callers)
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        for connection in callers.values():
            connection.close()
        for thread in (self._accepting, *callers):
            thread.join()
        self._listening.close()
        Path(self.socket_path).unlink(missing_ok=True)

    def _accept(self) -> None:
        assert self._listening is not None
        while not self._stopping:
            try:
                connected, _ = self._listening.accept()
            except OSError as error:
                if not self._stopping:
                    logger.info("a local caller was not accepted: %s", error.strerror)
                    time.sleep(_ACCEPT_RETRY_S)
                continue
            try:
                self._start(LocalConnection(connected))
            except Exception as error:
                # A caller of another user, or no thread can be had. The next caller must be served all the same.
                logger.info("a local caller was not accepted: %s", error)

    def _start(self, connection: LocalConnection) -> None:
        caller = _Caller(connection, self._calls, self._pool, self._instance, self._inline_multiply_adds, self._secret)
        thread = threading.Thread(target=self._serve, args=(caller,), daemon=True, name="local-caller")
        with self._lock:
            accepted = not self._stopping and len(self._callers) < MAX_CALLERS
            if accepted:
                self._callers[thread] = connection
        if not accepted:
            connection.close()
            return
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                del self._callers[thread]
            connection.close()
            raise

    def _serve(self, caller: "_Caller") -> None:
        try:
            caller.serve()
        finally:
            with self._lock:
                self._callers.pop(threading.current_thread(), None)


def _new_socket_path() -> str:
    """A free name in this user's own folder, from which what killed processes left is removed.

    Raises:
        OSError: the folder cannot be written.
        ValueError: there is no such folder.
    """
    room = len(f"/sockets/{secrets.token_hex(8)}")
    folder = private_folder(longest=MAX_SOCKET_PATH - room) / "sockets"
    folder.mkdir(mode=0o700, exist_ok=True)
    for path in folder.iterdir():
        # Of another type, so that a process that listens is not disturbed: only where none does is it refused.
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            # A young one may be about to listen.
            if time.time() - path.stat().st_mtime > _LEFT_BEHIND_S:
                probe.settimeout(0)
                if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
                    path.unlink()
    return str(folder / secrets.token_hex(8))


class _Caller:
    """One caller's connection, used by a thread of its own; the pool's threads send answers too."""

    def __init__(
        self,
        connection: LocalConnection,
        calls: ExpertCalls,
        pool: ThreadPoolExecutor,
        instance: str,
        inline_multiply_adds: int,
        secret: SystemSecret,
    ) -> None:
        self._connection = connection
        self._calls = calls
        self._pool = pool
        self._instance = instance
        self._inline_multiply_adds = inline_multiply_adds
        self._secret = secret
        self._computing: set[Future[None]] = set()

    def serve(self) -> None:
        """Answers the caller until it leaves. What was not begun then never is: the caller sends it elsewhere."""
        try:
            memory = self._attach()
            while memory is not None:
                self._handle(self._connection.receive(), memory)
        except LocalConnectionError as error:
            logger.info("a local caller's connection ended: %s", error)
        except Exception as error:
            # Its places in the code, not its text: that may show what was computed.
            places = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a local caller's packet was not handled: %s\n%s", type(error).__name__, places)
        finally:
            self._connection.close()
            for computing in list(self._computing):
                computing.cancel()

    def _attach(self) -> AttachedMemory | None:
        """The caller's memory, after telling it so; None after telling it why not."""
        self._connection.set_timeout(_ATTACH_TIMEOUT_S)
        packet, descriptor = self._connection.receive_with_descriptor()
        self._connection.set_timeout(None)
        request = expert_pb2.ForwardRequest()
        try:
            request = _parse(packet)
            memory = self._attached(request, descriptor)
        except (AttachError, LocalConnectionError) as error:
            self._connection.send(self._calls.failure(request, AttachError(str(error))))
            return None
        finally:
            if descriptor is not None:
                os.close(descriptor)
        response = expert_pb2.ForwardResponse(correlation_id=request.correlation_id, attached=self._instance)
        self._connection.send(response.SerializeToString())
        return memory

    def _attached(self, request: expert_pb2.ForwardRequest, descriptor: int | None) -> AttachedMemory:
        if self._secret.text and not self._secret.matches(((SECRET_KEY, request.attach.secret),)):
            raise AttachError("the caller does not have this system's secret")
        if not request.HasField("attach") or descriptor is None:
            raise AttachError("the first packet must have attach, and a descriptor with it")
        return AttachedMemory(descriptor, request.attach.size)

    def _handle(self, packet: bytes, memory: AttachedMemory) -> None:
        request = _parse(packet)
        before = self._calls.begin()
        if before is None:
            self._answer(self._calls.refusal(request))
            return
        cost = self._calls.multiply_adds(request)
        if before == 0 and cost is not None and cost <= self._inline_multiply_adds:
            self._compute(request, memory)
            return
        computing = self._pool.submit(self._compute, request, memory)
        self._computing.add(computing)
        computing.add_done_callback(self._ended)

    def _compute(self, request: expert_pb2.ForwardRequest, memory: AttachedMemory) -> None:
        try:
            if request.HasField("shared"):
                answer = self._calls.compute(request, None, memory)
            else:
                reason = "on the local socket the tensors lie in the shared memory: others are sent over gRPC"
                answer = self._calls.failure(request, InvalidTensorError(reason))
        finally:
            # Before the answer, so that the next call does not find this one under way.
            self._calls.end()
        self._answer(answer)

    def _answer(self, answer: bytes) -> None:
        if len(answer) > MAX_PACKET_BYTES:
            answer = _shortened(answer)
        try:
            self._connection.send(answer)
        except LocalConnectionError as error:
            logger.info("a local caller's connection ended: %s", error)
            self._connection.close()

    def _ended(self, computing: Future[None]) -> None:
        self._computing.discard(computing)
        if computing.cancelled():
            self._calls.end()


def _parse(packet: bytes) -> expert_pb2.ForwardRequest:
    try:
        return expert_pb2.ForwardRequest.FromString(packet)
    except DecodeError:
        raise LocalConnectionError("a packet is no ForwardRequest") from None


def _shortened(answer: bytes) -> bytes:
    """The same error with the beginning of its text alone: nothing but an error is ever so long."""
    response = expert_pb2.ForwardResponse.FromString(answer)
    error = status_pb2.Status(code=response.error.code, message=response.error.message[:_MAX_ERROR_CHARACTERS])
    return expert_pb2.ForwardResponse(correlation_id=response.correlation_id, error=error).SerializeToString()
