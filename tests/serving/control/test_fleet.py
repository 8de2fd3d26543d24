"""Control's fleet, against real expert groups and a real gRPC server for a Router's pins."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from echovlm_ray.checkpoint.layout import registry_root
from echovlm_ray.serving.cluster.endpoints import ReplicaAddresses
from echovlm_ray.serving.control.catalogue import Catalogue
from echovlm_ray.serving.control.fleet import GrpcFleet
from experts.bundles.bundle import Bundle
from experts.errors import ExpertCapacityError, InvalidBundleError, UnknownBundleError
from experts.group import ExpertGroup
from experts.kernels.registry import get_kernel
from experts.registry.registry import Registry
from router.rollouts.fleet import ReplicaLostError
from tests.changed_bundles import changed_bundle
from tests.expert_servers import ServerThread, expert_group, expert_process, server_thread
from tests.random_checkpoint import make_random
from tests.serving.control_system import PinningRouter, live_set, serving_router


@dataclass
class World:
    fleet: GrpcFleet
    servers: ServerThread
    registry: Registry
    digest: str
    next_digest: str
    experts: dict[str, list[ReplicaAddresses]] = field(default_factory=dict)
    routers: list[ReplicaAddresses] = field(default_factory=list)
    watching: set[str] = field(default_factory=set)

    def add(self, group: ExpertGroup, name: str) -> str:
        address = self.servers.serve(group)
        self.experts.setdefault(group.organ, []).append(ReplicaAddresses(address, "", name))
        return address


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fleet") / "demo"
    make_random(directory)
    registry = Registry(registry_root(directory))
    source = registry.open(live_set(directory).bundle_digest("heart"))
    changed_bundle(directory / "next", source, "1.1.0")
    registry.push(directory / "next")
    return directory


@pytest.fixture
def world(checkpoint: Path) -> Iterator[World]:
    registry = Registry(registry_root(checkpoint))
    found: list[World] = []
    fleet = GrpcFleet(
        lambda organ: found[0].experts.get(organ, []),
        lambda: found[0].routers,
        lambda: found[0].watching,
        Catalogue(registry).manifest,
        element_bytes=4,
    )
    with server_thread() as servers:
        digest, next_digest = (registry.find("heart", version).digest for version in ("1.0.0", "1.1.0"))
        found.append(World(fleet, servers, registry, digest, next_digest))
        yield found[0]
        fleet.close()


def heart(world: World) -> ExpertGroup:
    return expert_group("heart", Path(world.registry.root), [world.digest])


def test_replicas_are_named_as_serve_names_them_and_say_what_they_hold(world: World) -> None:
    assert world.fleet.replicas("heart") == []
    world.add(heart(world), "a")
    world.add(heart(world), "b")
    assert world.fleet.replicas("heart") == ["a", "b"]
    held = world.fleet.resident("b", "heart")
    assert dict(held.bytes_by_digest) == {world.digest: world.fleet.load_bytes("heart", world.digest)}
    assert held.limit_bytes == 1024**3
    assert not held.loading


def test_load_and_unload_again_and_again(world: World) -> None:
    world.add(heart(world), "a")
    for _ in range(2):
        world.fleet.load("a", "heart", world.next_digest, 30)
        assert set(world.fleet.resident("a", "heart").bytes_by_digest) == {world.digest, world.next_digest}
    for _ in range(2):
        world.fleet.unload("a", "heart", world.next_digest)
        assert set(world.fleet.resident("a", "heart").bytes_by_digest) == {world.digest}


def test_a_load_under_way_shows_how_far_it_is(world: World) -> None:
    reading, go_on = threading.Event(), threading.Event()

    def admit(bundle: Bundle) -> None:
        reading.set()
        assert go_on.wait(30)

    group = ExpertGroup(
        "heart", world.registry, get_kernel("reference"), device="cpu", max_resident_bytes=1024**3, admit=admit
    )
    world.add(group, "a")
    load = threading.Thread(target=world.fleet.load, args=("a", "heart", world.digest, 30))
    load.start()
    assert reading.wait(30)
    assert world.fleet.resident("a", "heart").loading == {world.digest: 0.0}
    go_on.set()
    load.join()
    held = world.fleet.resident("a", "heart")
    assert world.digest in held.bytes_by_digest
    assert not held.loading


def test_what_a_replica_answers_comes_back_as_what_it_is(world: World) -> None:
    small = ExpertGroup("heart", world.registry, get_kernel("reference"), device="cpu", max_resident_bytes=1000)
    world.add(small, "small")
    liver = world.registry.find("liver", "1.0.0").digest
    cases: list[tuple[str, type[Exception]]] = [
        (world.digest, ExpertCapacityError),
        (liver, InvalidBundleError),
        ("0" * 64, UnknownBundleError),
    ]
    for digest, kind in cases:
        with pytest.raises(kind):
            world.fleet.load("small", "heart", digest, 30)
    with pytest.raises(UnknownBundleError):
        world.fleet.load_bytes("heart", "0" * 64)


def test_a_load_that_takes_too_long_is_no_lost_replica(world: World) -> None:
    go_on = threading.Event()

    def wait_until_told(bundle: Bundle) -> None:
        go_on.wait(30)

    group = ExpertGroup(
        "heart",
        world.registry,
        get_kernel("reference"),
        device="cpu",
        max_resident_bytes=1024**3,
        admit=wait_until_told,
    )
    world.add(group, "a")
    try:
        with pytest.raises(TimeoutError, match=r"within 0\.2 s"):
            world.fleet.load("a", "heart", world.digest, 0.2)
    finally:
        go_on.set()


def calls(world: World, replica: str) -> list[Callable[[], object]]:
    return [
        lambda: world.fleet.resident(replica, "heart"),
        lambda: world.fleet.load(replica, "heart", world.next_digest, 30),
        lambda: world.fleet.unload(replica, "heart", world.next_digest),
    ]


def test_a_replica_that_is_gone_is_lost_and_its_successor_is_another(world: World) -> None:
    address = world.add(heart(world), "a")
    world.fleet.resident("a", "heart")
    world.servers.stop(address)
    for call in calls(world, "a"):
        with pytest.raises(ReplicaLostError) as caught:
            call()
        assert address not in str(caught.value)
    world.experts["heart"] = []
    world.fleet.keep_only([])
    for call in calls(world, "a"):
        with pytest.raises(ReplicaLostError):
            call()


def test_a_replica_that_is_killed_while_it_loads_is_lost(world: World) -> None:
    with expert_process("heart", Path(world.registry.root), world.digest) as running:
        world.experts["heart"] = [ReplicaAddresses(running.address, "", "a")]
        assert world.fleet.resident("a", "heart").bytes_by_digest
        running.process.kill()
        running.process.wait()
        for call in calls(world, "a"):
            with pytest.raises(ReplicaLostError):
                call()


def test_another_organ_in_a_replicas_place_is_not_taken_for_it(world: World) -> None:
    liver = world.registry.find("liver", "1.0.0").digest
    address = world.servers.serve(expert_group("liver", Path(world.registry.root), [liver]))
    world.experts["heart"] = [ReplicaAddresses(address, "", "a")]
    with pytest.raises(ReplicaLostError, match="liver"):
        world.fleet.resident("a", "heart")


async def test_pins_are_those_of_all_routers(world: World) -> None:
    import asyncio

    first, second = PinningRouter(), PinningRouter()
    first.pins.digests.extend(["a", "b"])
    second.pins.digests.extend(["b", "c"])
    async with serving_router(first) as one, serving_router(second) as two:
        world.routers = [ReplicaAddresses(server.address, "", server.address) for server in (one, two)]
        assert await asyncio.to_thread(world.fleet.pinned) == {"a", "b", "c"}
        # Those who only ask have no name.
        world.watching = {"r1", "r2", ""}
        assert await asyncio.to_thread(world.fleet.pinned) == {"a", "b", "c"}
        world.watching = {"r1", "r2", "r3"}
        with pytest.raises(ReplicaLostError, match="3 Routers are connected"):
            await asyncio.to_thread(world.fleet.pinned)
        world.watching = set()
        second.pins.policy_version = 0
        with pytest.raises(ReplicaLostError, match="no policy"):
            await asyncio.to_thread(world.fleet.pinned)
    with pytest.raises(ReplicaLostError, match="does not answer"):
        await asyncio.to_thread(world.fleet.pinned)
    world.routers = []
    with pytest.raises(ReplicaLostError, match="no Router"):
        await asyncio.to_thread(world.fleet.pinned)
