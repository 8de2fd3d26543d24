"""Control's gRPC services: which expert versions are live, and what runs where. Never on a request's path."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

import grpc

from echovlm_ray.serving.server import INTERNAL_CHANNEL_OPTIONS
from experts.manifest import Manifest
from experts.registry import Registry
from protos import control_pb2, control_pb2_grpc, status_pb2, status_pb2_grpc
from router.errors import UnknownOrganError
from router.expert_set import ExpertSet

CONTROL_SERVICE = control_pb2.DESCRIPTOR.services_by_name["ExpertControl"].full_name
STATUS_SERVICE = status_pb2.DESCRIPTOR.services_by_name["SystemStatus"].full_name
DESCRIBE_TIMEOUT_S = 2.0


class LiveExpertSet:
    """The expert set that new requests get, and a way to be told when it changes. Belongs to one event loop."""

    def __init__(self, expert_set: ExpertSet) -> None:
        """Starts with a set."""
        self._current = expert_set
        self._changed = asyncio.Condition()

    @property
    def current(self) -> ExpertSet:
        """The live set."""
        return self._current

    async def replace(self, expert_set: ExpertSet) -> None:
        """Makes another set live and tells all who watch."""
        async with self._changed:
            self._current = expert_set
            self._changed.notify_all()

    async def watch(self) -> AsyncIterator[ExpertSet]:
        """The set now, then every one that follows; whoever is slow sees only the latest."""
        seen = ""
        while True:
            async with self._changed:
                while self._current.id == seen:
                    await self._changed.wait()
                current = self._current
            seen = current.id
            yield current


class ExpertControlService(control_pb2_grpc.ExpertControlServicer):
    """Serves `echovlm.v1.ExpertControl` over a registry and the live set."""

    def __init__(self, registry: Registry, live: LiveExpertSet) -> None:
        """Takes where bundles are, and what is live."""
        self._registry = registry
        self._live = live

    async def List(
        self, request: control_pb2.ListRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ListResponse:
        """The live set and the registry's bundles, of one organ or of all."""
        live = self._live.current
        if request.organ and request.organ not in live.organs:
            raise UnknownOrganError(f"there is no organ {request.organ[:64]!r}: there are {', '.join(live.organs)}")
        manifests = await asyncio.to_thread(self._registry.list, request.organ or None)
        in_use = {member.bundle_digest for member in live.members}
        return control_pb2.ListResponse(
            live=expert_set_to_proto(live), bundles=[_bundle_info(manifest, in_use) for manifest in manifests]
        )

    async def Watch(
        self, request: control_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.ExpertSet]:
        """The live set now and whenever it changes."""
        async for expert_set in self._live.watch():
            yield expert_set_to_proto(expert_set)


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
        addresses: Mapping[str, Callable[[], Sequence[str]]],
        states: Callable[[], Mapping[str, ApplicationState]],
        live: LiveExpertSet,
    ) -> None:
        """Takes what there is to ask.

        Args:
            addresses: application → its replicas' addresses now, in the order in which status shows them.
            states: what Ray Serve says of them; may block, and is called on a thread.
            live: the live set.
        """
        self._addresses = dict(addresses)
        self._states = states
        self._live = live

    async def GetStatus(
        self, request: status_pb2.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> status_pb2.GetStatusResponse:
        """Every application with every replica that runs."""
        states = await asyncio.to_thread(self._states)
        replicas = await asyncio.gather(*[self._describe(source()) for source in self._addresses.values()])
        applications = []
        for name, found in zip(self._addresses, replicas, strict=True):
            state = states.get(name, ApplicationState("NOT_STARTED"))
            applications.append(
                status_pb2.ApplicationStatus(name=name, status=state.status, message=state.message, replicas=found)
            )
        return status_pb2.GetStatusResponse(applications=applications, expert_set_id=self._live.current.id)

    async def _describe(self, addresses: Sequence[str]) -> list[status_pb2.ReplicaDescription]:
        return list(await asyncio.gather(*[_describe_one(address) for address in addresses]))


async def _describe_one(address: str) -> status_pb2.ReplicaDescription:
    async with grpc.aio.insecure_channel(address, options=INTERNAL_CHANNEL_OPTIONS) as channel:
        stub = status_pb2_grpc.ReplicaStatusStub(channel)
        try:
            described: status_pb2.ReplicaDescription = await stub.Describe(
                status_pb2.DescribeRequest(), timeout=DESCRIBE_TIMEOUT_S
            )
        except grpc.aio.AioRpcError:
            # It is listed without a pid: it runs, as far as Serve knows, and does not answer.
            return status_pb2.ReplicaDescription(endpoint=address)
        return described


def expert_set_to_proto(expert_set: ExpertSet) -> control_pb2.ExpertSet:
    """The message of a set."""
    return control_pb2.ExpertSet(
        id=expert_set.id,
        backbone_digest=expert_set.backbone_digest,
        routing=expert_set.routing,
        members=[
            control_pb2.ExpertSetMember(organ=member.organ, bundle_digest=member.bundle_digest)
            for member in expert_set.members
        ],
    )


def _bundle_info(manifest: Manifest, in_use: set[str]) -> control_pb2.BundleInfo:
    return control_pb2.BundleInfo(
        organ=manifest.organ,
        name=manifest.name,
        version=manifest.version,
        digest=manifest.digest,
        description=manifest.description,
        num_experts=manifest.num_experts,
        size_bytes=sum(entry.size for entry in manifest.files),
        live=manifest.digest in in_use,
    )
