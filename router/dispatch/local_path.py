"""Opens the way to a replica on the same host: a connection to its Unix socket, and memory that both share."""

from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from experts.transport.local_connection import LocalConnection, LocalConnectionError, unsupported
from experts.transport.secret import SystemSecret
from experts.transport.shared_memory import MemoryBudget, SharedMemory
from protos import expert_pb2
from router.dispatch.links import LinkLostError, LocalLink
from router.dispatch.tokens import TokenWriter

# How long the replica may take to map the memory. Meanwhile the organ may be unavailable.
OPEN_TIMEOUT_S = 2.0


class LocalPathError(ConnectionError):
    """There is no local path to a replica. The text says why, without paths."""


@dataclass(frozen=True, slots=True, eq=False)
class LocalPath:
    """A connection, and what writes tokens into the shared memory."""

    link: LocalLink
    writer: TokenWriter

    def close(self) -> None:
        """Ends the connection. The memory is freed when no output in it is referred to any more."""
        self.link.close()


def open_local_path(
    status: expert_pb2.ExpertGroupStatusResponse,
    *,
    secret: SystemSecret,
    budget: MemoryBudget,
    received: Callable[[expert_pb2.ForwardResponse], None],
) -> LocalPath:
    """Connects to a replica and hands the memory over.

    Args:
        status: the replica's, which names the socket and the instance that must answer there.
        secret: the system's.
        budget: of the memory.
        received: called with each answer by a thread that waits; it may raise `LinkLostError`.

    Raises:
        LocalPathError: the replica cannot be reached, cannot map the memory, or is another one.
        FileNotFoundError: the socket is not there, as on another host.
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
