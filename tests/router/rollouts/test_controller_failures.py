"""Failures of a candidate (P5), and automatic rollback."""

import threading

import pytest

from experts.errors import ExpertCapacityError
from router.rollouts.fleet import ReplicaLostError
from router.rollouts.health import Observation
from router.rollouts.latency import LatencyHistogram
from router.rollouts.settings import RolloutPlan, RolloutSettings, Thresholds
from router.rollouts.states import State
from tests.router.rollouts.support import (
    QUICK,
    controller_of,
    reconcile_until,
    settle,
)
from tests.router.rollouts.world import World, waiting_for


def test_a_candidate_that_does_not_verify_is_never_loaded(world: World) -> None:
    key = world.fleet.push("v2", content=b"something else")
    world.operations.stage("heart", key, actor="ann")
    rollout = world.reach(State.FAILED)
    assert rollout.reason == "verification failed: the bundle is not what its digest says"
    assert world.store.history("heart")[-1].reason == rollout.reason
    assert world.fleet.loads[4:] == []
    assert world.stable() == world.v1


def test_a_candidate_that_is_too_large_fails(world: World) -> None:
    world.stage(size=950)
    assert "1050 bytes are above the limit 1000" in world.reach(State.FAILED).reason
    world.reach_held(world.v1)


def test_a_candidate_that_fails_on_a_later_replica_gives_its_memory_back_on_the_first(world: World) -> None:
    key = world.fleet.push("v2")
    held_when_it_failed: list[dict[str, set[str]]] = []

    def refuse(replica: str, loaded: str) -> None:
        if replica == "heart-2" and loaded == key:
            held_when_it_failed.append(world.fleet.held("heart"))
            raise ExpertCapacityError("above the limit of heart-2")

    world.fleet.before_load = refuse
    world.operations.stage("heart", key, actor="ann")
    assert "loading on replica heart-2 failed: above the limit" in world.reach(State.FAILED).reason
    assert held_when_it_failed == [{"heart-1": {world.v1, key}, "heart-2": {world.v1}}]
    world.reach_held(world.v1)


def test_room_that_older_versions_still_take_is_waited_for(world: World) -> None:
    old = world.fleet.push("old", 500)
    for replica in ("heart-1", "heart-2"):
        world.fleet.load(replica, "heart", old, 1)
    world.fleet.pins = {old}
    key = world.stage(size=500)
    reconcile_until(world.controller, lambda _: ("heart-1", key) in world.fleet.loads)
    settle(world.controller)
    assert world.rollout().state == State.VERIFIED
    world.fleet.pins = set()
    world.clock.move(60)
    world.reach(State.WARM)


def test_a_candidate_that_is_slow_to_warm_fails_and_gives_its_memory_back(world: World) -> None:
    proceed = threading.Event()
    world.fleet.before_load = waiting_for(proceed)
    world.stage(plan=RolloutPlan(warm_timeout_s=30))
    world.reach(State.VERIFIED)
    settle(world.controller)
    world.clock.move(31)
    rollout = world.reach(State.FAILED)
    assert "slow to warm: not loaded everywhere within 30 s" in rollout.reason
    assert "heart-1, heart-2 of 2 replicas" in rollout.reason
    proceed.set()
    settle(world.controller)
    world.reach_held(world.v1)


def test_a_new_organ_without_replicas_fails_in_time(world: World) -> None:
    world.stage("lung v1", organ="lung", plan=RolloutPlan(warm_timeout_s=30))
    world.reach(State.VERIFIED, "lung")
    world.clock.move(31)
    assert "no replica of 'lung' is running" in world.reach(State.FAILED, "lung").reason


def test_a_verifier_that_hangs_is_not_waited_for(world: World) -> None:
    hang = threading.Event()

    class Hanging:
        def verify(self, organ: str, digest: str) -> None:
            hang.wait(10)

    controller = controller_of(world.store, world.fleet, verifier=Hanging())
    world.stage()
    settle(controller)
    assert world.rollout().state == State.STAGED
    world.clock.move(QUICK.verify_timeout_s + 1)
    settle(controller, 3)
    assert "took longer than 600 s" in world.rollout().reason
    hang.set()
    settle(controller)
    assert world.rollout().state == State.FAILED


@pytest.mark.parametrize("error", [SystemExit("bye"), MemoryError(), KeyError("x")], ids=repr)
def test_a_verifier_that_crashes_fails_the_candidate_only(world: World, error: BaseException) -> None:
    class Crashing:
        def verify(self, organ: str, digest: str) -> None:
            raise error

    controller = controller_of(world.store, world.fleet, verifier=Crashing())
    world.stage()
    reconcile_until(controller, lambda _: world.rollout().state == State.FAILED)
    assert world.rollout().reason.startswith("verification failed: ")
    assert world.stable() == world.v1


def test_a_candidate_that_takes_replicas_down_is_given_up(world: World) -> None:
    key = world.fleet.push("v2")
    numbers = iter(range(3, 9))

    def crash(replica: str, loaded: str) -> None:
        if loaded == key:
            world.fleet.remove_replica("heart", replica)
            world.fleet.add_replica("heart", f"heart-{next(numbers)}")
            raise ReplicaLostError("connection reset")

    world.fleet.before_load = crash
    world.operations.stage("heart", key, actor="ann")
    rollout = world.reach(State.FAILED)
    assert "3 replicas were lost in loading it: connection reset" in rollout.reason
    world.fleet.before_load = lambda replica, key: None
    world.reach_held(world.v1)
    assert len(world.fleet.held("heart")) == 2


def test_after_a_loss_the_candidate_waits_until_the_incumbent_is_back_everywhere(world: World) -> None:
    controller = controller_of(world.store, world.fleet, RolloutSettings(loss_pause_s=15))
    key = world.fleet.push("v2")
    losses: list[str] = []

    def crash(replica: str, loaded: str) -> None:
        if loaded == key and not losses:
            losses.append(replica)
            raise ReplicaLostError("connection reset")

    world.fleet.before_load = crash
    world.operations.stage("heart", key, actor="ann")
    reconcile_until(controller, lambda _: world.rollout().replica_losses == 1)
    settle(controller)
    assert all(held == {world.v1} for held in world.fleet.held("heart").values())
    world.clock.move(16)
    world.fleet.silent = {"heart-2"}
    settle(controller)
    assert all(held == {world.v1} for held in world.fleet.held("heart").values())
    world.fleet.silent = set()
    reconcile_until(controller, lambda _: world.rollout().state == State.WARM)


def test_the_incumbent_has_the_older_right_to_the_memory(world: World) -> None:
    key = world.stage(size=850)
    world.reach(State.WARM)
    world.operations.canary("heart", 5, actor="ann")
    # A replica is replaced by one with little room that holds the candidate only.
    world.fleet.remove_replica("heart", "heart-1")
    world.fleet.limit_bytes = 900
    world.fleet.add_replica("heart", "heart-3", key)
    rollout = world.reach(State.FAILED)
    assert "has no room for the stable version beside it" in rollout.reason
    world.clock.move(60)
    world.reach_held(world.v1)


# Automatic rollback.

LIMITS = Thresholds(min_requests=10, max_error_rate=0.1, max_latency_ratio=2, window_s=60)


def report(world: World, key: str, requests: int, errors: int = 0, nonfinite: int = 0, time_s: float = 0.01) -> None:
    latency = LatencyHistogram.of([time_s] * (requests - errors))
    world.monitor.record(Observation("heart", key, requests, errors, nonfinite, latency))


@pytest.mark.parametrize("mode", ["canary", "shadow"])
@pytest.mark.parametrize(
    ("observed", "words"),
    [
        ({"requests": 20, "errors": 10}, "10 of 40 requests failed, 25 %"),
        ({"requests": 2, "nonfinite": 1}, "infinite or not a number"),
        ({"requests": 20, "time_s": 0.05}, "times as much"),
    ],
)
def test_a_candidate_over_its_thresholds_goes_back_by_itself(
    world: World, mode: str, observed: dict[str, float], words: str
) -> None:
    key = world.stage(plan=RolloutPlan(thresholds=LIMITS))
    world.reach(State.WARM)
    getattr(world.operations, mode)("heart", 50, actor="ann")
    report(world, world.v1, 100)
    report(world, key, 20)
    settle(world.controller, 3)
    assert world.rollout().state == mode
    world.clock.move(61)
    report(world, world.v1, 100)
    report(world, key, **observed)  # type: ignore[arg-type]
    rollout = world.reach(State.ROLLED_BACK)
    assert words in rollout.reason
    entry = world.store.history("heart")[-1]
    assert (entry.actor, entry.reason) == ("controller", rollout.reason)
    assert world.store.policy().candidates == ()
    world.reach_held(world.v1)


def test_failures_of_an_earlier_attempt_do_not_count_and_slow_ones_of_this_one_do(world: World) -> None:
    key = world.stage(plan=RolloutPlan(thresholds=LIMITS))
    world.reach(State.WARM)
    report(world, key, 20, errors=20)
    world.clock.move(1)
    world.operations.canary("heart", 50, actor="ann")
    settle(world.controller, 3)
    assert world.rollout().state == State.CANARY
    for _ in range(8):
        # Far fewer within the window than min_requests.
        world.clock.move(61)
        report(world, world.v1, 1)
        report(world, key, 1, errors=1)
        settle(world.controller, 2)
        if world.rollout().state != State.CANARY:
            break
    assert world.rollout().state == State.ROLLED_BACK
    assert world.rollout().reason.startswith("4 of 4 requests failed")
