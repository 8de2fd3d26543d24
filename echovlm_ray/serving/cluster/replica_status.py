"""The description of a replica, for `echoray status`."""

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import grpc
import psutil

from protos import expert_pb2, status_pb2, status_pb2_grpc

SERVICE_NAME = status_pb2.DESCRIPTOR.services_by_name["ReplicaStatus"].full_name


@dataclass(frozen=True, slots=True)
class ReplicaIdentity:
    """Which replica this is.

    Attributes:
        device: "cpu" or "cuda:0".
        organ: of an expert group; otherwise "".
        arithmetic: what multiplies on the CPU, and why not the C library; "" where nothing does.
    """

    application: str
    deployment: str
    replica_id: str
    device: str = "cpu"
    organ: str = ""
    arithmetic: str = ""


class ReplicaStatusService(status_pb2_grpc.ReplicaStatusServicer):
    """Serves `echovlm.v1.ReplicaStatus`."""

    def __init__(
        self,
        identity: ReplicaIdentity,
        endpoint: Callable[[], str],
        queue_length: Callable[[], int],
        bundles: Callable[[], Sequence[expert_pb2.ResidentBundle]] = tuple,
        problem: Callable[[], str] = str,
        refusals: Callable[[], Mapping[tuple[str, str], int]] = dict,
    ) -> None:
        """Takes what is fixed, and callables for what changes."""
        self._identity = identity
        self._endpoint = endpoint
        self._queue_length = queue_length
        self._bundles = bundles
        self._problem = problem
        self._refusals = refusals
        self._process = psutil.Process()

    async def Describe(
        self, request: status_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> status_pb2.ReplicaDescription:
        """Process, memory, queue and, of an expert group, what is resident."""
        identity = self._identity
        return status_pb2.ReplicaDescription(
            application=identity.application,
            deployment=identity.deployment,
            replica_id=identity.replica_id,
            endpoint=self._endpoint(),
            node=socket.gethostname(),
            pid=os.getpid(),
            device=identity.device,
            resident_bytes=self._process.memory_info().rss,
            queue_length=self._queue_length(),
            organ=identity.organ,
            bundles=self._bundles(),
            problem=self._problem(),
            arithmetic=identity.arithmetic,
            refusals=[
                status_pb2.Refusals(reason=reason, caller=caller, count=count)
                for (reason, caller), count in sorted(self._refusals().items())
            ],
        )
