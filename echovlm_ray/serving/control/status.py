"""The status of the system: Control collects the descriptions of all replicas."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import grpc

from experts.transport.inner_channel import PLAIN_CHANNELS, InnerChannels
from protos import control_pb2, status_pb2, status_pb2_grpc

DESCRIBE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class ApplicationState:
    """Ray Serve's status of an application.

    Attributes:
        status: RUNNING, DEPLOYING, UNHEALTHY, …
        message: the reason, if it is not RUNNING.
    """

    status: str
    message: str = ""


class SystemStatusService(status_pb2_grpc.SystemStatusServicer):
    """Serves `echovlm.v1.SystemStatus`: collects the descriptions of all replicas."""

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
            applications: returns the applications that should run, in the order of the status; may block, and is called
                on a thread.
            addresses: application → its replicas' current addresses.
            states: returns Ray Serve's status of them; may block, and is called on a thread.
            expert_set_id: returns the id of the live set.
            problems: returns the organs' problems; may block, and is called on a thread.
            identity: the identity of the deployment.
            notices: returns other problems as text; may block, and is called on a thread.
            channels: opens channels to the replicas.
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
        """Returns every application with its running replicas."""
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
            # Listed without a pid: it runs according to Serve, but does not answer.
            return status_pb2.ReplicaDescription(endpoint=address)
        return described
