"""Control's own service on a real server, over a real registry, store and controller; only its replicas are folders."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from echovlm_ray.serving.control import CONTROL_SERVICE
from echovlm_ray.serving.control.catalogue import Catalogue
from echovlm_ray.serving.control.operation_threads import operation_threads
from echovlm_ray.serving.control.policies import PolicyPublisher
from echovlm_ray.serving.control.policy_propagation import PolicyPropagation
from echovlm_ray.serving.control.push import PushReceiver
from echovlm_ray.serving.control.replay_check import ReplayCheck
from echovlm_ray.serving.control.replays import Replays
from echovlm_ray.serving.control.service import ExpertControlService
from echovlm_ray.serving.control.state import StateReader, StateWatch
from echovlm_ray.serving.control.watchers import Watchers
from echovlm_ray.serving.grpc.server import GrpcServer, ServerOptions
from experts.bundles.layout import expected_tensors
from experts.bundles.manifest import BundleDescription
from experts.bundles.signing import SignaturePolicy
from experts.bundles.writer import write_bundle
from experts.errors import ExpertCapacityError
from experts.registry.registry import Registry
from protos import control_pb2_grpc
from router.gating.expert_set import ExpertSet, ExpertSetMember
from router.rollouts.controller import RolloutController
from router.rollouts.database import Database
from router.rollouts.fleet import ReplicaResidents
from router.rollouts.health import HealthMonitor
from router.rollouts.leases import Leases
from router.rollouts.operations import RolloutOperations
from router.rollouts.records import Rollout
from router.rollouts.settings import RolloutSettings
from router.rollouts.store import RolloutStore
from tests.router.rollouts.gate_support import FileEvaluator
from tests.router.rollouts.support import QUICK, FolderFleet
from tests.waiting import until

ORGANS = ("breast", "heart")
BACKBONE = "b" * 64


def make_bundle(directory: Path, organ: str, version: str) -> Path:
    description = BundleDescription(
        name=f"{organ}-experts",
        organ=organ,
        version=version,
        description="for tests",
        authors="the tests",
        license="Apache-2.0",
        intended_use="tests only",
        backbone_digest=BACKBONE,
        num_layers=1,
        num_experts=2,
        hidden_size=8,
        intermediate_size=8,
        dtype="float32",
    )
    generator = torch.Generator().manual_seed(sum(f"{organ} {version}".encode()))
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, (dtype, shape) in expected_tensors(description).items()
    }
    write_bundle(directory, description, tensors.__getitem__)
    return directory


class RegistryFleet(FolderFleet):
    """Holds a file as large as its bundle for each that is loaded. A load waits for `proceed`."""

    def __init__(self, root: Path, registry: Registry) -> None:
        super().__init__(root, limit_bytes=100_000)
        self.registry = registry
        self.proceed = threading.Event()
        self.proceed.set()
        self.loading: dict[tuple[str, str], float] = {}

    def load(self, replica: str, organ: str, digest: str, timeout_s: float) -> None:
        self.loading[replica, digest] = 0.4
        try:
            self.proceed.wait(10)
            nbytes = self.load_bytes(organ, digest)
            held = self.resident(replica, organ).bytes_by_digest
            if sum(held.values()) + nbytes > self.limit_bytes:
                raise ExpertCapacityError(f"{nbytes} bytes more are above the limit {self.limit_bytes}")
            (self.root / organ / replica / digest).write_bytes(bytes(nbytes))
        finally:
            del self.loading[replica, digest]

    def resident(self, replica: str, organ: str) -> ReplicaResidents:
        held = super().resident(replica, organ)
        loading = {digest: done for (name, digest), done in list(self.loading.items()) if name == replica}
        return ReplicaResidents(held.bytes_by_digest, held.limit_bytes, loading)

    def load_bytes(self, organ: str, digest: str) -> int:
        return self.registry.open(digest).manifest.size_bytes

    def verify(self, organ: str, digest: str) -> None:
        self.registry.open(digest).verify(finite=True)


@dataclass
class System:
    """What the commands work on, and what tests look at."""

    address: str
    directory: Path
    registry: Registry
    fleet: RegistryFleet
    store: RolloutStore
    monitor: HealthMonitor
    controller: RolloutController
    leases: Leases
    evaluator: FileEvaluator
    settings: RolloutSettings = QUICK
    digests: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, organ: str, version: str, *, damaged: bool = False) -> str:
        """Puts a version into the registry."""
        bundle = make_bundle(self.directory / f"{organ}-{version}", organ, version)
        manifest = self.registry.push(bundle)
        if damaged:
            weights = self.registry.open(manifest.digest).locations["experts.safetensors"]
            weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        self.digests[organ, version] = manifest.digest
        return manifest.digest

    def rollout(self, organ: str = "heart") -> Rollout:
        return self.store.rollouts(organ, limit=1)[0]

    def reach(self, state: str, organ: str = "heart") -> Rollout:
        until(lambda: self.rollout(organ).state == state)
        return self.rollout(organ)


@contextmanager
def running_control(
    directory: Path, options: ServerOptions | None = None, replay_settings: RolloutSettings = QUICK
) -> Iterator[System]:
    """Breast and heart are served with version 1.0.0, by two replicas each; heart 1.1.0 is in the registry."""
    registry = Registry(directory / "registry")
    fleet = RegistryFleet(directory / "fleet", registry)
    database = Database(f"sqlite:///{directory}/rollouts.db")
    store = RolloutStore(database)
    monitor = HealthMonitor()
    leases, evaluator = Leases(), FileEvaluator()
    controller = RolloutController(store, fleet, fleet, QUICK, monitor, leases, evaluator)
    system = System("", directory, registry, fleet, store, monitor, controller, leases, evaluator, replay_settings)
    members = []
    for organ in ORGANS:
        key = system.add(organ, "1.0.0")
        members.append(ExpertSetMember(organ=organ, bundle_digest=key))
        for number in (1, 2):
            fleet.add_replica(organ, f"{organ}-{number}", key)
    store.adopt(ExpertSet(backbone_digest=BACKBONE, routing="organs", members=tuple(members)), actor="start")
    system.add("heart", "1.1.0")
    controller.start()
    try:
        with _serving(system, options or ServerOptions()) as system.address:
            yield system
    finally:
        fleet.proceed.set()
        controller.stop()
        database.close()


@contextmanager
def _serving(system: System, options: ServerOptions) -> Iterator[str]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    threads = operation_threads()

    async def start() -> tuple[GrpcServer, StateWatch, Replays]:
        catalogue = Catalogue(system.registry)
        policies = PolicyPublisher(system.store, catalogue.version, None)
        await policies.start()
        reader = StateReader(system.store, system.fleet, catalogue.version, 1.0, system.controller)
        watch = StateWatch(reader, system.store)
        check = ReplayCheck(system.registry, SignaturePolicy().admit, catalogue.version)
        replays = Replays(system.store, system.fleet, system.leases, system.controller, check, system.settings)
        service = ExpertControlService(
            store=system.store,
            operations=RolloutOperations(system.store, system.fleet, QUICK, catalogue.version, system.evaluator),
            catalogue=catalogue,
            pushes=PushReceiver(system.registry, system.directory / "incoming", max_bytes=10**7),
            reader=reader,
            watch=watch,
            propagation=PolicyPropagation(policies, Watchers(), dict, timeout_s=1.0),
            default_organ="breast",
            threads=threads,
            replays=replays,
        )
        server = GrpcServer(options)
        server.add(control_pb2_grpc.add_ExpertControlServicer_to_server, service, CONTROL_SERVICE)
        await server.start()
        return server, watch, replays

    server, watch, replays = asyncio.run_coroutine_threadsafe(start(), loop).result(20)
    try:
        yield server.address
    finally:
        watch.stop()
        replays.close()
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        threads.shutdown()
