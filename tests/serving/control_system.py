"""Control's own parts, wired as the deployment wires them, over real expert groups, servers and a database."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from echovlm_ray.checkpoint.layout import read_index, registry_root
from echovlm_ray.config import ExpertsSection, ModelSection, RolloutsSection
from echovlm_ray.serving.cluster.endpoints import ReplicaAddresses
from echovlm_ray.serving.cluster.rollout_files import RolloutFiles
from echovlm_ray.serving.control import CONTROL_SERVICE, FEED_SERVICE
from echovlm_ray.serving.control.catalogue import Catalogue
from echovlm_ray.serving.control.feed import RolloutFeedService
from echovlm_ray.serving.control.fleet import GrpcFleet
from echovlm_ray.serving.control.operation_threads import operation_threads
from echovlm_ray.serving.control.policies import PolicyPublisher
from echovlm_ray.serving.control.policy_propagation import PolicyPropagation
from echovlm_ray.serving.control.push import PushReceiver
from echovlm_ray.serving.control.service import ExpertControlService
from echovlm_ray.serving.control.state import StateReader, StateWatch
from echovlm_ray.serving.control.verifier import SubprocessVerifier
from echovlm_ray.serving.control.watchers import WatcherKind, Watchers
from echovlm_ray.serving.grpc.inner_server import inner_server
from echovlm_ray.serving.grpc.server import GrpcServer, ServerOptions
from experts.registry.registry import Registry
from experts.transport.inner_channel import InnerChannels
from experts.transport.secret import SystemSecret
from protos import control_pb2, control_pb2_grpc, router_pb2, router_pb2_grpc
from router.gating.expert_set import ExpertSet
from router.rollouts.controller import RolloutController
from router.rollouts.database import Database
from router.rollouts.health import HealthMonitor
from router.rollouts.operations import RolloutOperations
from router.rollouts.settings import Thresholds
from router.rollouts.store import RolloutStore
from tests.expert_servers import ServerThread, expert_group

ORGANS = ("breast", "heart")
SECTION = RolloutsSection(
    period_s=0.05,
    take_up_timeout_s=1.0,
    thresholds=Thresholds(min_requests=5, min_successes=0, max_latency_ratio=3),
    max_push_bytes=2**25,
)
TIMEOUT_S = 60.0


class PinningRouter(router_pb2_grpc.RouterServicer):
    """A Router's part for Control: a policy, and the bundles that it needs."""

    def __init__(self) -> None:
        self.pins = router_pb2.PinsResponse(policy_version=1)
        self.follows: Callable[[], control_pb2.TrafficPolicy] | None = None

    async def Pins(self, request: router_pb2.PinsRequest, context: grpc.aio.ServicerContext) -> router_pb2.PinsResponse:
        answer = router_pb2.PinsResponse()
        answer.CopyFrom(self.pins)
        if self.follows is not None:
            policy = self.follows()
            answer.policy_version = policy.version
            answer.digests.extend(member.bundle_digest for member in policy.stable.members)
            answer.digests.extend(candidate.digest for candidate in policy.candidates)
        return answer


@asynccontextmanager
async def serving_router(router: PinningRouter) -> AsyncIterator[GrpcServer]:
    server = GrpcServer(ServerOptions())
    name = router_pb2.DESCRIPTOR.services_by_name["Router"].full_name
    server.add(router_pb2_grpc.add_RouterServicer_to_server, router, name)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)


@dataclass
class ControlSystem:
    stub: control_pb2_grpc.ExpertControlStub
    feed: control_pb2_grpc.RolloutFeedStub
    store: RolloutStore
    fleet: GrpcFleet
    controller: RolloutController
    files: RolloutFiles
    registry: Registry
    router: PinningRouter
    monitor: HealthMonitor
    feed_address: str
    replicas: dict[str, list[ReplicaAddresses]] = field(default_factory=dict)
    # How many Routers and gateways there are, as Serve would say.
    running: dict[WatcherKind, int] = field(default_factory=dict)

    async def rollout(self, organ: str) -> control_pb2.Rollout:
        response = await self.stub.List(control_pb2.ListRequest(organ=organ))
        rollout: control_pb2.Rollout
        (rollout,) = response.rollouts
        return rollout

    async def until(self, organ: str, state: str) -> control_pb2.Rollout:
        deadline = time.monotonic() + TIMEOUT_S
        while (rollout := await self.rollout(organ)).state != state:
            assert rollout.state not in ("failed", "rolled_back"), rollout.reason
            assert time.monotonic() < deadline, f"still {rollout.state}"
            await asyncio.sleep(0.02)
        return rollout

    async def residents(self, organ: str) -> list[set[str]]:
        response = await self.stub.List(control_pb2.ListRequest(organ=organ))
        return [{bundle.digest for bundle in replica.bundles} for replica in response.replicas]


def live_set(checkpoint: Path) -> ExpertSet:
    whole = read_index(checkpoint).expert_set()
    members = tuple(member for member in whole.members if member.organ in ORGANS)
    return ExpertSet(backbone_digest=whole.backbone_digest, routing=whole.routing, members=members)


def serve_experts(expert_set: ExpertSet, registry: Path, servers: ServerThread) -> dict[str, list[ReplicaAddresses]]:
    """One replica for each organ of the set, unless it has some already."""
    replicas = {}
    for member in expert_set.members:
        addresses = servers.addresses(member.organ) or [
            servers.serve(expert_group(member.organ, registry, [member.bundle_digest]))
        ]
        replicas[member.organ] = [ReplicaAddresses(address, "", f"{member.organ}-{address}") for address in addresses]
    return replicas


@asynccontextmanager
async def control_system(
    checkpoint: Path, directory: Path, servers: ServerThread, *, replaceable: bool = True
) -> AsyncIterator[ControlSystem]:
    """Control over one expert replica per organ. A later one in the same directory finds the same database."""
    expert_set = live_set(checkpoint)
    section = SECTION.model_copy(update={"database": f"sqlite:///{directory / 'state' / 'rollouts.db'}"})
    files = RolloutFiles.of(section, checkpoint)
    model = ModelSection(checkpoint=checkpoint)
    experts = ExpertsSection(kernel="reference")
    database = Database(files.database)
    store = RolloutStore(database)
    store.adopt(expert_set, actor="start")
    registry = Registry(registry_root(checkpoint))
    catalogue = Catalogue(registry)
    replicas = serve_experts(expert_set, Path(registry.root), servers)
    router = PinningRouter()
    running: dict[WatcherKind, int] = {}
    monitor = HealthMonitor()
    watchers = Watchers()
    async with contextlib.AsyncExitStack() as stack:
        served = await stack.enter_async_context(serving_router(router))
        fleet = GrpcFleet(
            lambda organ: replicas.get(organ, []),
            lambda: [ReplicaAddresses(served.address, "", "router-1")],
            watchers.connected,
            catalogue.manifest,
            element_bytes=4,
        )
        stack.callback(fleet.close)
        verifier = SubprocessVerifier(
            model, experts, section, lambda: catalogue.manifest(expert_set.members[0].bundle_digest)
        )
        stack.callback(verifier.close)
        controller = RolloutController(store, fleet, verifier, section, monitor)
        policies = PolicyPublisher(store, catalogue.version, files.policy)
        await policies.start()
        stack.callback(policies.stop)
        router.follows = lambda: policies.current
        feed = RolloutFeedService(policies, watchers, store, monitor, controller.wake)
        propagation = PolicyPropagation(policies, watchers, lambda: running, section.take_up_timeout_s)
        status_timeout_s = section.status_timeout_s
        reader = StateReader(store, fleet, catalogue.version, status_timeout_s, controller, propagation.missing)
        watch = StateWatch(reader, store)
        stack.callback(watch.stop)
        pushes = PushReceiver(registry, files.incoming, section.max_push_bytes)
        operations = RolloutOperations(store, fleet, section) if replaceable else None
        threads = operation_threads()
        stack.callback(threads.shutdown)
        service = ExpertControlService(
            store, operations, catalogue, pushes, reader, watch, propagation, "breast", threads
        )
        server = GrpcServer(ServerOptions())
        server.add(control_pb2_grpc.add_ExpertControlServicer_to_server, service, CONTROL_SERVICE)
        await server.start()
        stack.push_async_callback(server.stop, 0)
        channels = InnerChannels(SystemSecret.random())
        inner = inner_server("127.0.0.1", channels.secret)
        inner.add(control_pb2_grpc.add_RolloutFeedServicer_to_server, feed, FEED_SERVICE)
        await inner.start()
        stack.push_async_callback(inner.stop, 0)
        controller.start()
        stack.push_async_callback(asyncio.to_thread, controller.stop)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
        to_feed = await stack.enter_async_context(channels.asynchronous(inner.address))
        yield ControlSystem(
            control_pb2_grpc.ExpertControlStub(channel),
            control_pb2_grpc.RolloutFeedStub(to_feed),
            store,
            fleet,
            controller,
            files,
            registry,
            router,
            monitor,
            inner.address,
            replicas,
            running,
        )
    database.close()
