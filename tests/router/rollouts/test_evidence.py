"""Steps end on evidence, promoted versions go on being judged, and no clock that is set changes either."""

from typing import Any

import pytest

from router.rollouts.controller import RolloutController
from router.rollouts.health import HealthMonitor, Observation
from router.rollouts.latency import LatencyHistogram
from router.rollouts.settings import Mode, RolloutPlan, RolloutSettings, Step, Thresholds
from router.rollouts.states import State
from tests.router.rollouts.support import QUICK, actions, controller_of, reconcile_until, settle
from tests.router.rollouts.world import World

WATCH_S = 600.0
CAREFUL = RolloutSettings(period_s=0.02, status_timeout_s=0.5, loss_pause_s=0, watch_after_promotion_s=WATCH_S)
STEPS = (Step(mode="shadow", percent=50, hold_s=60), Step(percent=50, hold_s=60))


def report(world: World, key: str, requests: int, errors: int = 0, organ: str = "heart", time_s: float = 0.01) -> None:
    latency = LatencyHistogram.of([time_s] * (requests - errors))
    world.monitor.record(Observation(organ, key, requests, errors, latency=latency))


def stage(world: World, name: str = "v2", organ: str = "heart", size: int = 100, **plan: Any) -> str:
    values = {"watch_after_promotion_s": WATCH_S, "thresholds": Thresholds(), **plan}
    return world.stage(name, organ, RolloutPlan.model_validate(values), size)


def promote(world: World, organ: str = "heart") -> None:
    world.reach(State.WARM, organ)
    world.operations.promote(organ, actor="ann")
    settle(world.controller, 4)


def waits(world: World, controller: RolloutController | None = None) -> str:
    return (controller or world.controller).waits_for(world.rollout().id)


# Steps.


def test_a_step_waits_for_time_and_for_successes_and_says_so(world: World) -> None:
    key = stage(world, steps=STEPS, promote=True)
    world.reach(State.SHADOW)
    settle(world.controller, 2)
    assert waits(world) == "the step's 60 s and 20 more successful requests of 20"
    world.clock.move(60)
    settle(world.controller, 2)
    assert waits(world) == "20 more successful requests of 20"
    report(world, key, 9, errors=1)
    report(world, key, 11)
    settle(world.controller, 2)
    assert (world.rollout().state, waits(world)) == (State.SHADOW, "1 more successful request of 20")
    report(world, key, 1)
    world.clock.move(1)
    world.reach(State.CANARY)
    # What was seen in the step before does not count for this one.
    settle(world.controller, 2)
    assert waits(world) == "the step's 60 s and 20 more successful requests of 20"
    report(world, key, 20)
    settle(world.controller, 2)
    assert waits(world) == "the step's 60 s"
    world.clock.move(60)
    world.reach(State.STABLE)


def test_without_traffic_nothing_is_promoted_however_long_it_takes(world: World) -> None:
    stage(world, steps=STEPS, promote=True)
    world.reach(State.SHADOW)
    for _ in range(5):
        world.clock.move(86_400)
        settle(world.controller, 2)
    assert world.rollout().state == State.SHADOW
    assert waits(world) == "20 more successful requests of 20"


@pytest.mark.parametrize("where", ["step", "thresholds"])
def test_time_alone_is_enough_where_that_is_configured(world: World, where: str) -> None:
    step = Step(percent=50, hold_s=60, min_successes=0 if where == "step" else None)
    stage(world, steps=(step,), promote=True, thresholds=Thresholds(min_successes=20 if where == "step" else 0))
    world.reach(State.CANARY)
    world.clock.move(60)
    world.reach(State.STABLE)


@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_a_candidate_whose_every_answer_fails_goes_back_after_a_handful(world: World, mode: Mode) -> None:
    report(world, world.v1, 500)
    world.clock.move(1)
    key = stage(world, steps=(Step(mode=mode, percent=5, hold_s=10),), promote=True)
    world.reach(State(mode))
    number = 0
    while world.rollout().state == mode and number < 48:
        number += 1
        world.clock.move(1)
        report(world, key, 1, errors=1)
        settle(world.controller, 1)
    assert number <= 5
    assert world.rollout().reason.startswith(f"{number} of {number} requests failed, 100 %")
    assert world.stable() == world.v1


def test_a_restart_takes_the_evidence_and_the_time_so_that_both_begin_anew(world: World) -> None:
    key = stage(world, steps=STEPS, promote=True)
    world.reach(State.SHADOW)
    settle(world.controller, 2)
    world.clock.move(59)
    report(world, key, 20)
    again = controller_of(world.store, world.fleet, CAREFUL, HealthMonitor(world.clock.monotonic))
    world.clock.move(5)
    settle(again)
    assert world.rollout().state == State.SHADOW
    assert waits(world, again) == "the step's 60 s and 20 more successful requests of 20"


def test_an_earlier_version_comes_back_without_traffic(world: World) -> None:
    operations = type(world.operations)(world.store, world.fleet, CAREFUL)
    stage(world)
    promote(world)
    operations.roll_back_stable("heart", world.rollout().digest, actor="ann", reason="no good")
    reconcile_until(world.controller, lambda _: world.stable() == world.v1)
    assert world.rollout().reason == "no good"


# The clock.


@pytest.mark.parametrize("hours", [1, -1])
def test_a_clock_that_is_set_neither_ends_nor_lengthens_a_step(world: World, hours: int) -> None:
    key = stage(world, steps=STEPS[1:], promote=True, watch_after_promotion_s=0)
    world.reach(State.CANARY)
    report(world, key, 20)
    settle(world.controller, 2)
    world.clock.set(3600 * hours)
    settle(world.controller, 3)
    assert world.rollout().state == State.CANARY
    world.clock.move(59)
    settle(world.controller, 3)
    assert world.rollout().state == State.CANARY
    world.clock.move(1)
    world.reach(State.STABLE)


@pytest.mark.parametrize("hours", [1, -1])
def test_a_clock_that_is_set_neither_ends_nor_lengthens_the_time_to_warm(world: World, hours: int) -> None:
    world.fleet.remove_replica("heart", "heart-2")
    world.fleet.remove_replica("heart", "heart-1")
    stage(world, warm_timeout_s=30)
    world.reach(State.VERIFIED)
    settle(world.controller, 2)
    world.clock.set(3600 * hours)
    settle(world.controller, 3)
    world.clock.move(30)
    settle(world.controller, 3)
    assert world.rollout().state == State.VERIFIED
    world.clock.move(1)
    assert "slow to warm" in world.reach(State.FAILED).reason


@pytest.mark.parametrize("hours", [1, -1])
def test_a_clock_that_is_set_loses_no_evidence_and_invents_none(world: World, hours: int) -> None:
    key = stage(world)
    world.reach(State.WARM)
    world.operations.canary("heart", 50, actor="ann")
    settle(world.controller, 2)
    report(world, key, 2, errors=2)
    settle(world.controller, 2)
    assert world.rollout().state == State.CANARY
    world.clock.set(3600 * hours)
    world.clock.move(1)
    report(world, key, 2, errors=2)
    assert world.reach(State.ROLLED_BACK).reason.startswith("4 of 4 requests failed")


# After the promotion.


def test_a_promoted_version_that_does_well_stays_with_the_one_before_beside_it(world: World) -> None:
    report(world, world.v1, 1000)
    key = stage(world)
    promote(world)
    assert world.stable() == key
    assert all(held == {world.v1, key} for held in world.fleet.held("heart").values())
    assert world.controller.is_spare("heart", world.v1)
    assert waits(world) == "the end of its watch, 600 s after its promotion"
    world.clock.move(WATCH_S - 1)
    report(world, key, 1000)
    settle(world.controller, 2)
    assert world.stable() == key
    assert world.rollout().watching


def test_a_promoted_version_that_fails_goes_back_and_the_history_says_why(world: World) -> None:
    report(world, world.v1, 1000)
    key = stage(world)
    promote(world)
    failed = world.rollout()
    world.fleet.loads.clear()
    world.clock.move(300)
    report(world, key, 5, errors=5)
    settle(world.controller, 4)
    assert world.stable() == world.v1
    # It was in memory, so nothing was loaded or verified again.
    assert world.fleet.loads == []
    reason = f"{failed.id} fails after its promotion: 5 of 5 requests failed, 100 %"
    assert world.rollout().reason.startswith(reason)
    entries = world.store.history("heart")[-5:]
    assert actions(entries) == ["stage", "verify", "warm_up", "promote", "rollback"]
    assert all(entry.actor == "controller" and reason in entry.reason for entry in entries)
    assert world.store.rollout(failed.id).state == State.ROLLED_BACK
    # The one that is back is not watched, and the other one leaves.
    world.reach_held(world.v1)
    report(world, world.v1, 50, errors=50)
    settle(world.controller)
    assert world.stable() == world.v1
    assert world.store.verify_history().intact


def test_the_version_before_leaves_when_the_watch_is_over(world: World) -> None:
    key = stage(world)
    promote(world)
    world.clock.set(7200)
    world.clock.move(WATCH_S - 1)
    settle(world.controller)
    assert all(held == {world.v1, key} for held in world.fleet.held("heart").values())
    world.clock.move(1)
    world.reach_held(key)
    # Then it is not judged any more, and a restart begins no other watch.
    again = controller_of(world.store, world.fleet, CAREFUL, world.monitor)
    report(world, key, 50, errors=50)
    settle(again)
    assert (world.stable(), world.rollout().watching) == (key, False)
    assert all(held == {key} for held in world.fleet.held("heart").values())


def test_what_the_version_before_did_is_the_measure_of_a_promoted_one(world: World) -> None:
    report(world, world.v1, 1000, errors=100)
    world.clock.move(30)
    key = stage(world)
    promote(world)
    for _ in range(50):
        world.clock.move(5)
        report(world, key, 20, errors=2)
        settle(world.controller, 1)
    assert world.stable() == key


def test_a_new_organ_that_fails_has_nothing_to_go_back_to_and_says_so(world: World) -> None:
    world.fleet.add_replica("lung", "lung-1")
    key = stage(world, "lung v1", "lung")
    promote(world, "lung")
    report(world, key, 5, errors=5, organ="lung")
    settle(world.controller, 4)
    rollout = world.rollout("lung")
    assert rollout.state == State.STABLE
    words = "it fails, and there is no version before it to go back to: 5 of 5 requests failed"
    assert rollout.reason.startswith(words)
    (entry,) = [entry for entry in world.store.history("lung") if entry.action == "failing"]
    assert entry.actor == "controller"
    assert entry.reason.startswith(words)


def test_a_candidate_does_not_keep_a_failing_version_in_its_place(world: World) -> None:
    key = stage(world)
    promote(world)
    stage(world, "v3")
    candidate = world.reach(State.WARM)
    world.operations.canary("heart", 10, actor="ann")
    report(world, key, 5, errors=5)
    settle(world.controller, 5)
    assert world.stable() == world.v1
    assert world.store.rollout(candidate.id).state == State.ROLLED_BACK
    assert "fails, and the version before that comes back" in world.store.rollout(candidate.id).reason


def test_the_version_before_makes_room_for_a_candidate(world: World) -> None:
    key = stage(world, size=300)
    promote(world)
    memory = world.operations.stage("heart", world.fleet.push("v3", 650), actor="ann", dry_run=True).memory
    assert [(each.resident_bytes, each.fits) for each in memory] == [(300, True)] * 2
    new = stage(world, "v3", size=650)
    settle(world.controller)
    world.clock.move(60)
    world.reach(State.WARM)
    assert all(held == {key, new} for held in world.fleet.held("heart").values())
    # It failed meanwhile: the version before is loaded again.
    report(world, key, 5, errors=5)
    reconcile_until(world.controller, lambda _: world.stable() == world.v1)


def test_a_replica_that_comes_back_gets_the_version_before_as_well(world: World) -> None:
    key = stage(world)
    promote(world)
    world.fleet.remove_replica("heart", "heart-1")
    world.fleet.add_replica("heart", "heart-3")
    world.reach_held(key, world.v1)
    # Where there is no room, it is done without.
    world.fleet.limit_bytes = 150
    world.fleet.add_replica("heart", "heart-4")
    reconcile_until(world.controller, lambda _: world.fleet.held("heart")["heart-4"] == {key})
    settle(world.controller)
    assert world.fleet.held("heart")["heart-4"] == {key}
    assert world.stable() == key


def test_a_version_that_requests_use_is_not_spare(world: World) -> None:
    stage(world)
    world.reach(State.WARM)
    world.fleet.pins = {world.v1}
    world.operations.promote("heart", actor="ann")
    settle(world.controller)
    assert not world.controller.is_spare("heart", world.v1)
    world.fleet.pins = None
    settle(world.controller, 2)
    assert not world.controller.is_spare("heart", world.v1)
    world.fleet.pins = set()
    settle(world.controller, 2)
    assert world.controller.is_spare("heart", world.v1)


def test_settings_fill_what_a_plan_leaves_open(world: World) -> None:
    world.stage(plan=RolloutPlan())
    assert world.rollout().plan.watch_after_promotion_s == QUICK.watch_after_promotion_s
    world.operations.rollback("heart", actor="ann")
    world.stage("v3", plan=RolloutPlan(watch_after_promotion_s=7))
    assert world.rollout().plan.watch_after_promotion_s == 7


# Latency.


def test_a_slow_candidate_is_taken_back_however_thin_the_traffic(world: World) -> None:
    key = stage(world, steps=STEPS[1:], promote=True)
    world.reach(State.CANARY)
    for _ in range(20):
        # Five within the window.
        world.clock.move(60)
        report(world, world.v1, 1)
        report(world, key, 1, time_s=0.05)
        settle(world.controller, 2)
    rollout = world.rollout()
    assert rollout.state == State.ROLLED_BACK
    assert "times as much" in rollout.reason


def test_times_of_another_step_are_not_compared(world: World) -> None:
    """At night few requests reached the candidate, by day half of all, and by day all of them are slower."""
    steps = (Step(percent=5, hold_s=60), Step(percent=50, hold_s=60))
    key = stage(world, steps=steps)
    world.reach(State.CANARY)
    report(world, world.v1, 400)
    report(world, key, 20)
    world.clock.move(60)
    reconcile_until(world.controller, lambda _: world.rollout().percent == 50)
    settle(world.controller, 2)
    world.clock.move(2)
    report(world, world.v1, 30, time_s=0.05)
    report(world, key, 30, time_s=0.05)
    settle(world.controller, 3)
    assert world.rollout().state == State.CANARY


def test_a_promotion_says_where_latency_was_not_judged(world: World) -> None:
    key = stage(world, steps=STEPS[1:], promote=True)
    world.reach(State.CANARY)
    report(world, world.v1, 20)
    world.clock.move(60)
    report(world, key, 20)
    rollout = world.reach(State.STABLE)
    assert "latency was not judged: only 0 of its requests ended beside the incumbent's" in rollout.reason
    assert world.store.history("heart")[-1].reason == rollout.reason
