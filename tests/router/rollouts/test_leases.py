"""Bundles leased by replays stay resident for the lease, and never impede rollouts."""

import threading

import pytest

from experts.errors import ExpertCapacityError
from router.gating.expert_set import ExpertSet, ExpertSetMember
from router.rollouts.leases import Leases
from router.rollouts.replica_memory import memory_shortage, missing_bundles
from router.rollouts.states import State
from tests.router.rollouts.support import QUICK, controller_of, settle
from tests.router.rollouts.world import World, waiting_for


def past_set(world: World, digest: str) -> ExpertSet:
    live = world.store.policy().stable
    members = tuple(
        ExpertSetMember(organ=member.organ, bundle_digest=digest if member.organ == "heart" else member.bundle_digest)
        for member in live.members
    )
    return live.model_copy(update={"members": members})


def with_leases(world: World) -> Leases:
    leases = Leases()
    world.controller = controller_of(world.store, world.fleet, QUICK, world.monitor, leases=leases)
    return leases


def load(world: World, digest: str) -> None:
    for replica in world.fleet.replicas("heart"):
        world.fleet.load(replica, "heart", digest, 1.0)


def test_what_is_held_is_unloaded_when_the_last_lease_ends(world: World) -> None:
    leases = with_leases(world)
    old = world.fleet.push("old")
    first, second = (leases.take(past_set(world, old), ["heart"]) for _ in range(2))
    load(world, old)
    settle(world.controller)
    world.reach_held(world.v1, old)
    leases.release(first)
    settle(world.controller)
    world.reach_held(world.v1, old)
    leases.release(second)
    world.reach_held(world.v1)


def test_without_its_lease_nothing_is_held_after_a_restart_of_the_controller(world: World) -> None:
    leases = with_leases(world)
    old = world.fleet.push("old")
    leases.take(past_set(world, old), ["heart"])
    load(world, old)
    settle(world.controller)
    world.controller = controller_of(world.store, world.fleet)
    world.reach_held(world.v1)


def test_only_a_ready_lease_gives_its_set(world: World) -> None:
    leases = Leases()
    expert_set = past_set(world, world.fleet.push("old"))
    lease = leases.take(expert_set, ["heart"])
    assert leases.ready_set(expert_set.id) is None
    lease.ready = True
    assert leases.ready_set(expert_set.id) == expert_set
    assert leases.digests("liver") == frozenset()
    leases.release(lease)
    assert leases.ready_set(expert_set.id) is None


def test_a_candidate_waits_for_a_lease_and_does_not_fail_of_it(world: World) -> None:
    leases = with_leases(world)
    world.fleet.limit_bytes = 250
    old = world.fleet.push("old")
    lease = leases.take(past_set(world, old), ["heart"])
    load(world, old)
    candidate = world.stage("new")
    world.reach(State.VERIFIED)
    settle(world.controller, passes=40)
    assert world.rollout().state == State.VERIFIED
    leases.release(lease)
    world.clock.move(60)
    world.reach(State.WARM)
    world.reach_held(world.v1, candidate)


def waits(world: World, digest: str) -> str:
    members = [member for member in past_set(world, digest).members if member.organ == "heart"]
    missing = missing_bundles(world.fleet, members)
    assert len(missing) == 2
    return memory_shortage(world.fleet, world.store.snapshot(), missing)


def test_room_is_what_the_rollouts_leave(world: World) -> None:
    old, other = world.fleet.push("old"), world.fleet.push("other")
    assert waits(world, old) == ""
    world.fleet.limit_bytes = 200
    assert waits(world, old) == ""
    load(world, other)
    assert "other replays" in waits(world, old)
    assert "200 bytes (experts.max_resident_bytes)" in waits(world, old)
    world.fleet.limit_bytes = 199
    with pytest.raises(ExpertCapacityError, match=r"limit is 199 \(experts.max_resident_bytes\)"):
        waits(world, old)


def test_a_candidate_has_its_room_reserved_before_it_is_loaded(world: World) -> None:
    old = world.fleet.push("old")
    world.fleet.limit_bytes = 250
    proceed = threading.Event()
    world.fleet.before_load = waiting_for(proceed)
    world.stage("new")
    assert waits(world, old) == ""
    world.reach(State.VERIFIED)
    with pytest.raises(ExpertCapacityError, match="takes 200"):
        waits(world, old)
    proceed.set()
    world.reach(State.WARM)
