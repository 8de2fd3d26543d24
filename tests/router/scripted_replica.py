"""A replica in this process, and a script that answers at its local socket instead of it."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from experts.group import ExpertGroup
from experts.kernels.base import NO_EXPERT
from experts.private_folder import private_folder
from experts.service import ExpertGroupService
from experts.transport import local_connection
from experts.transport.local_connection import LocalConnection, LocalConnectionError
from protos import expert_pb2
from router.dispatch.local import LocalExperts
from router.dispatch.remote import RemoteExperts
from tests.expert_servers import ServerThread
from tests.split_golden import SplitGolden

ORGAN = "liver"
PATIENCE_S = 20

# Serves one connection, of which it is given the number, from 0.
Script = Callable[[LocalConnection, int], None]


class Replica:
    """A replica, and a router's way to it."""

    def __init__(self, split: SplitGolden, group: ExpertGroup, threads: ServerThread) -> None:
        self.digest = split.expert_set.bundle_digest(ORGAN)
        self.local = LocalExperts({ORGAN: group})
        self.threads = threads
        self.address = threads.serve(group)
        self.hidden_size = int(str(split.config["hidden_size"]))
        self.dtype = split.tensors["lm_head.weight"].dtype

    @property
    def service(self) -> ExpertGroupService:
        return self.threads.services[self.address]

    @property
    def server(self) -> Any:
        return self.service._local_server

    @contextmanager
    def router(self, timeout_s: float = 10.0) -> Iterator[RemoteExperts]:
        """The router's placement, connected."""
        experts = RemoteExperts(lambda organ: [self.address], exchange_timeout_s=timeout_s)
        try:
            experts.wait_until_connected([ORGAN], PATIENCE_S)
            yield experts
        finally:
            experts.close()

    def inputs(self, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return (
            torch.randn((5, self.hidden_size), generator=generator).to(self.dtype),
            torch.randint(NO_EXPERT, 2, (5, 2), generator=generator),
            torch.rand((5, 2), generator=generator).to(self.dtype),
        )

    def compute(self, experts: RemoteExperts, times: int = 3) -> None:
        """Several calls at once, all answered with the right bits."""
        arguments = [self.inputs(seed) for seed in range(times)]
        calls = [experts.send(ORGAN, self.digest, 1, *each) for each in arguments]
        for call, each in zip(calls, arguments, strict=True):
            assert torch.equal(call.result(), self.local.send(ORGAN, self.digest, 1, *each).result())


@contextmanager
def scripted(replica: Replica, script: Script) -> Iterator[None]:
    """Another process's socket, as it were, in place of the replica's: serves connections as the script says."""
    path = private_folder() / "sockets" / f"test-{os.getpid()}"
    listening = local_connection.listen_on(str(path))
    connections: list[LocalConnection] = []

    def serve(connection: LocalConnection, number: int) -> None:
        with suppress(LocalConnectionError):
            script(connection, number)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connections.append(LocalConnection(listening.accept()[0]))
                arguments = (connections[-1], len(connections) - 1)
                threading.Thread(target=serve, args=arguments, daemon=True).start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    original, replica.server.socket_path = replica.server.socket_path, str(path)
    yield
    replica.server.socket_path = original
    listening.shutdown(socket.SHUT_RDWR)
    accepting.join()
    for connection in connections:
        connection.close()
    listening.close()
    path.unlink()


def attach(connection: LocalConnection, instance: str) -> None:
    """What a replica does first."""
    packet, descriptor = connection.receive_with_descriptor()
    assert descriptor is not None
    os.close(descriptor)
    request = expert_pb2.ForwardRequest.FromString(packet)
    response = expert_pb2.ForwardResponse(correlation_id=request.correlation_id, attached=instance)
    connection.send(response.SerializeToString())
    connection.set_timeout(None)


def read(connection: LocalConnection) -> expert_pb2.ForwardRequest:
    return expert_pb2.ForwardRequest.FromString(connection.receive())
