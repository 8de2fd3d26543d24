"""The status of the system: Control asks every replica to describe itself."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import grpc

from experts.transport.inner_channel import PLAIN_CHANNELS, InnerChannels
from protos import control_pb2, status_pb2, status_pb2_grpc

DESCRIBE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class ApplicationState:
    """What Ray Serve says of an application.

    Attributes:
        status: RUNNING, DEPLOYING, UNHEALTHY, …
        message: why, if it is not well.
    """

    status: str
    message: str = ""


class SystemStatusService(status_pb2_grpc.SystemStatusServicer):
    """Serves `echovlm.v1.SystemStatus`: asks every replica to describe itself."""

    def __init__(
        self,
        applications: Callable[[], Sequence[str]],
        addresses: Callable[[str], Sequence[str]],
        states: Callable[[], Mapping[str, ApplicationState]],
        expert_set_id: Callable[[], str],
        problems: Callable[[], Sequence[control_pb2.OrganProblem]] = tuple,
        identity: str = "",
        notices: Callable[[], Sequence[str]] = tuple,
        channels: InnerChannels = PLAIN_CHANNELS,
    ) -> None:
        """
        Args:
            applications: those that there should be now, in the order in which status shows them; may block, and is
                called on a thread.
            addresses: application → its replicas' addresses now.
            states: what Ray Serve says of them; may block, and is called on a thread.
            expert_set_id: of the live set.
            problems: what cannot be answered as it should be; may block, and is called on a thread.
            identity: of the deployment.
            notices: what is wrong beside the applications, in words; may block, and is called on a thread.
            channels: connects to the replicas.
        """
        self._applications = applications
        self._addresses = addresses
        self._states = states
        self._expert_set_id = expert_set_id
        self._problems = problems
        self._identity = identity
        self._notices = notices
        self._connections = channels

    async def GetStatus(
        self, request: status_pb2.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> status_pb2.GetStatusResponse:
        """Every application with every replica that runs."""
        states, names, problems, notices = await asyncio.to_thread(
            lambda: (self._states(), self._applications(), self._problems(), self._notices())
        )
        replicas = await asyncio.gather(*[self._describe(self._addresses(name)) for name in names])
        applications = []
        for name, found in zip(names, replicas, strict=True):
            state = states.get(name, ApplicationState("NOT_STARTED"))
            applications.append(
                status_pb2.ApplicationStatus(name=name, status=state.status, message=state.message, replicas=found)
            )
        return status_pb2.GetStatusResponse(
            applications=applications,
            expert_set_id=self._expert_set_id(),
            problems=problems,
            identity=self._identity,
            notices=notices,
        )

    async def _describe(self, addresses: Sequence[str]) -> list[status_pb2.ReplicaDescription]:
        return list(await asyncio.gather(*[_describe_one(address, self._connections) for address in addresses]))


async def _describe_one(address: str, channels: InnerChannels) -> status_pb2.ReplicaDescription:
    async with channels.asynchronous(address) as channel:
        stub = status_pb2_grpc.ReplicaStatusStub(channel)
        try:
            described: status_pb2.ReplicaDescription = await stub.Describe(
                status_pb2.DescribeRequest(), timeout=DESCRIBE_TIMEOUT_S
            )
        except grpc.aio.AioRpcError:
            # It is listed without a pid: it runs, as far as Serve knows, and does not answer.
            return status_pb2.ReplicaDescription(endpoint=address)
        return described
