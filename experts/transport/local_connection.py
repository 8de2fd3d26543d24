"""A connection between two processes of one user on one host: a Unix socket for packets and a descriptor.

`SOCK_SEQPACKET` preserves the boundaries and the order of packets, and reports when the other end has closed; see
unix(7). The kernel wakes the waiting thread directly, without another thread in between.
"""

import os
import select
import socket
import struct
import sys
import threading
from contextlib import suppress
from typing import Self

# The tensors are in shared memory, so packets are small. A longer one is not sent, and receiving one ends the
# connection.
MAX_PACKET_BYTES = 16 * 1024
# A caller waits for answers when this many requests are outstanding. This many packets fit in each direction's buffer,
# so sending never blocks.
MAX_UNANSWERED = 64
# The system may limit it to less.
_BUFFER_BYTES = 512 * 1024
_BACKLOG = 128
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
# struct ucred of socket(7): process, user and group.
_CREDENTIALS = struct.Struct("3i")
_DESCRIPTOR = struct.Struct("i")
_TIMEVAL = struct.Struct("@ll")
_SILENT = "the other process does not answer"


class LocalConnectionError(ConnectionError):
    """A connection failed or has ended. The text has the reason, without paths."""


def unsupported() -> str | None:
    """Why this platform does not support such connections, or None."""
    return None if sys.platform.startswith("linux") else "it needs Linux"


def listen_on(path: str) -> socket.socket:
    """A socket that listens on a path.

    Raises:
        OSError: the path exists, is too long, or cannot be written.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listening.bind(path)
        listening.listen(_BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


class LocalConnection:
    """One end of a connection. Thread-safe, but only one thread at a time may receive."""

    def __init__(self, connected: socket.socket) -> None:
        """Takes ownership of a connected socket.

        Raises:
            LocalConnectionError: the other process belongs to another user; the socket is closed.
        """
        self._socket = connected
        self._buffer = memoryview(bytearray(MAX_PACKET_BYTES))
        # The socket is closed under both locks, so that no thread uses a descriptor that was reused for another file.
        self._receiving = threading.Lock()
        self._sending = threading.Lock()
        try:
            _check_peer(connected)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        except BaseException:
            connected.close()
            raise

    @classmethod
    def connect(cls, path: str, timeout_s: float) -> Self:
        """Connects to a path. `timeout_s` is also the timeout of `receive` until `set_timeout` is called.

        Raises:
            FileNotFoundError: the path does not exist; it may be on another host.
            LocalConnectionError: connecting failed, or the listening process belongs to another user.
        """
        connecting = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # The socket option, because the timeout of the socket object would also make `send` wait.
            connecting.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout_s))
            connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(timeout_s))
            connecting.connect(path)
        except FileNotFoundError:
            connecting.close()
            raise
        except OSError as error:
            connecting.close()
            raise LocalConnectionError(f"its local socket cannot be connected to: {_reason(error)}") from None
        return cls(connecting)

    @property
    def connected(self) -> bool:
        """Whether the connection is open, as far as is known without receiving."""
        with self._sending:
            if self._socket.fileno() < 0:
                return False
            looking = select.poll()
            looking.register(self._socket, 0)
            return not looking.poll(0)

    def set_timeout(self, timeout_s: float | None) -> None:
        """Sets the timeout of `receive`; None disables it."""
        with suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(timeout_s))

    def send(self, packet: bytes, descriptor: int | None = None) -> None:
        """Sends a packet, optionally with a descriptor. Does not block.

        Raises:
            LocalConnectionError: the connection has ended, the packet is too long, or the buffer is full of unread
                packets.
        """
        if len(packet) > MAX_PACKET_BYTES:
            raise LocalConnectionError(f"a packet has {len(packet)} bytes, and {MAX_PACKET_BYTES} are allowed")
        with self._sending:
            try:
                if descriptor is None:
                    self._socket.send(packet, _SEND_FLAGS)
                else:
                    socket.send_fds(self._socket, [packet], [descriptor])
            except BlockingIOError:
                raise LocalConnectionError("the other process does not read what it is sent") from None
            except OSError as error:
                raise LocalConnectionError(_reason(error)) from None

    def receive(self) -> bytes:
        """Waits for a packet.

        Raises:
            LocalConnectionError: the connection has ended, the timeout passed, or the packet is too long.
        """
        with self._receiving:
            try:
                # With MSG_TRUNC the full length is returned, also for a packet that does not fit.
                length = self._socket.recv_into(self._buffer, 0, socket.MSG_TRUNC)
            except BlockingIOError:
                raise LocalConnectionError(_SILENT) from None
            except OSError as error:
                raise LocalConnectionError(_reason(error)) from None
            _check_length(length)
            return bytes(self._buffer[:length])

    def receive_with_descriptor(self) -> tuple[bytes, int | None]:
        """Waits for a packet with a descriptor, which the caller must close.

        Raises:
            LocalConnectionError: as in `receive`.
        """
        with self._receiving:
            try:
                packet, ancillary, flags, _ = self._socket.recvmsg(
                    MAX_PACKET_BYTES, socket.CMSG_LEN(_DESCRIPTOR.size), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                raise LocalConnectionError(_SILENT) from None
            except OSError as error:
                raise LocalConnectionError(_reason(error)) from None
        descriptors = [
            found[0]
            for level, kind, data in ancillary
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            for found in _DESCRIPTOR.iter_unpack(data[: len(data) - len(data) % _DESCRIPTOR.size])
        ]
        try:
            _check_length(MAX_PACKET_BYTES + 1 if flags & socket.MSG_TRUNC else len(packet))
            if len(descriptors) > 1 or flags & socket.MSG_CTRUNC:
                raise LocalConnectionError("more than one descriptor came with a packet")
        except LocalConnectionError:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return packet, descriptors[0] if descriptors else None

    def close(self) -> None:
        """Ends the connection and wakes a waiting thread. Idempotent."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._receiving, self._sending:
            self._socket.close()


def _check_peer(connected: socket.socket) -> None:
    try:
        credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError as error:
        raise LocalConnectionError(f"the other process is not known: {_reason(error)}") from None
    _, user, _ = _CREDENTIALS.unpack(credentials)
    if user != os.geteuid():
        raise LocalConnectionError(f"the other process is of user {user}, and this one of user {os.geteuid()}")


def _check_length(length: int) -> None:
    if length == 0:
        raise LocalConnectionError("the other process closed the connection")
    if length > MAX_PACKET_BYTES:
        raise LocalConnectionError(f"a packet of more than {MAX_PACKET_BYTES} bytes came")


def _timeval(seconds: float | None) -> bytes:
    """A value for `SO_RCVTIMEO` of socket(7); 0 disables the timeout."""
    microseconds = 0 if seconds is None else max(1, round(seconds * 1e6))
    return _TIMEVAL.pack(*divmod(microseconds, 1_000_000))


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
