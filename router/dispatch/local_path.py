"""Connects to a replica on the same host: its Unix socket, and shared memory."""

from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from experts.transport.local_connection import LocalConnection, LocalConnectionError, unsupported
from experts.transport.secret import SystemSecret
from experts.transport.shared_memory import MemoryBudget, SharedMemory
from protos import expert_pb2
from router.dispatch.links import LinkLostError, LocalLink
from router.dispatch.tokens import TokenWriter

# How long the replica may take to map the memory. The organ may be unavailable until then.
OPEN_TIMEOUT_S = 2.0


class LocalPathError(ConnectionError):
    """There is no local path to a replica. The text has the reason, without paths."""


@dataclass(frozen=True, slots=True, eq=False)
class LocalPath:
    """A connection, and the writer of tokens to shared memory."""

    link: LocalLink
    writer: TokenWriter

    def close(self) -> None:
        """Ends the connection. The memory is freed when no output refers to it any more."""
        self.link.close()


def open_local_path(
    status: expert_pb2.ExpertGroupStatusResponse,
    *,
    secret: SystemSecret,
    budget: MemoryBudget,
    received: Callable[[expert_pb2.ForwardResponse], None],
) -> LocalPath:
    """Connects to a replica and shares memory with it.

    Args:
        status: the replica's status, which names the socket and the instance that must answer.
        secret: the system's secret.
        budget: the limit for shared memory.
        received: called with each answer by a waiting thread; may raise `LinkLostError`.

    Raises:
        LocalPathError: the replica is unreachable, cannot map the memory, or is another instance.
        FileNotFoundError: the socket does not exist, for example because the replica is on another host.
    """
    if reason := unsupported():
        raise LocalPathError(reason)
    try:
        memory = SharedMemory(budget)
    except OSError as error:
        raise LocalPathError(f"no memory can be had ({error.strerror})") from None
    try:
        connection = LocalConnection.connect(status.local_socket, OPEN_TIMEOUT_S)
        try:
            _attach(connection, memory, status.instance, secret)
        except BaseException:
            connection.close()
            raise
    except LocalConnectionError as error:
        raise LocalPathError(str(error)) from None
    finally:
        memory.close_descriptor()

    def parse(packet: bytes) -> None:
        received(_parse(packet))

    return LocalPath(LocalLink(connection, parse), TokenWriter(memory))


def _attach(connection: LocalConnection, memory: SharedMemory, instance: str, secret: SystemSecret) -> None:
    attach = expert_pb2.SharedMemory(size=memory.size, secret=secret.text)
    request = expert_pb2.ForwardRequest(correlation_id=1, attach=attach)
    connection.send(request.SerializeToString(), memory.descriptor)
    try:
        response = _parse(connection.receive())
    except LinkLostError as error:
        raise LocalPathError(str(error)) from None
    if response.HasField("error"):
        raise LocalPathError(response.error.message)
    if response.attached != instance:
        raise LocalPathError("another process answers at its local socket")
    connection.set_timeout(None)


def _parse(packet: bytes) -> expert_pb2.ForwardResponse:
    try:
        return expert_pb2.ForwardResponse.FromString(packet)
    except DecodeError:
        raise LinkLostError("a packet is no ForwardResponse") from None
