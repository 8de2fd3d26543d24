import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from router.errors import RolloutStateError
from router.rollouts.database import Database
from router.rollouts.fleet import ReplicaResidents
from router.rollouts.settings import RolloutPlan, Step
from router.rollouts.states import State
from router.rollouts.store import RolloutStore
from tests.router.rollouts.support import (
    QUICK,
    DigestVerifier,
    FolderFleet,
    actions,
    controller_of,
    reconcile_until,
    settle,
)
from tests.router.rollouts.world import World, waiting_for
from tests.waiting import until


def test_a_staged_candidate_is_verified_loaded_everywhere_and_waits(world: World) -> None:
    key = world.stage()
    world.reach(State.WARM)
    assert world.fleet.held("heart") == {replica: {world.v1, key} for replica in ("heart-1", "heart-2")}
    settle(world.controller)
    assert world.rollout().state == State.WARM
    assert world.stable() == world.v1
    assert world.store.policy().candidates == ()
    assert actions(world.store.history("heart")) == ["stage", "verify", "warm_up"]


def test_after_promotion_the_old_version_stays_while_it_is_pinned(world: World) -> None:
    key = world.stage()
    world.reach(State.WARM)
    world.fleet.pins = {world.v1}
    world.operations.promote("heart", actor="ann")
    assert world.stable() == key
    settle(world.controller)
    assert all(held == {world.v1, key} for held in world.fleet.held("heart").values())
    # A router that cannot be asked may still use it.
    world.fleet.pins = None
    settle(world.controller)
    assert all(held == {world.v1, key} for held in world.fleet.held("heart").values())
    world.fleet.pins = set()
    world.reach_held(key)


def test_a_replica_that_comes_back_gets_the_earlier_versions_that_requests_still_use(world: World) -> None:
    key = world.stage()
    world.reach(State.WARM)
    world.fleet.pins = {world.v1}
    world.operations.promote("heart", actor="ann")
    settle(world.controller)
    world.fleet.remove_replica("heart", "heart-1")
    # What is used is unknown: it gets the stable version, and the rest once that is known.
    world.fleet.pins = None
    world.fleet.add_replica("heart", "heart-3")
    reconcile_until(world.controller, lambda _: world.fleet.held("heart")["heart-3"] == {key})
    world.fleet.pins = {world.v1}
    world.reach_held(world.v1, key)
    world.fleet.pins = set()
    world.reach_held(key)


@pytest.mark.parametrize("promoted", [False, True], ids=["a candidate", "a stable version"])
def test_a_replica_that_comes_back_gets_a_version_that_was_taken_back_while_requests_use_it(
    world: World, promoted: bool
) -> None:
    key = world.stage()
    world.reach(State.WARM)
    if promoted:
        world.operations.promote("heart", actor="ann")
    else:
        world.operations.canary("heart", percent=50, actor="ann")
    world.fleet.pins = {key}
    if promoted:
        world.operations.roll_back_stable("heart", key, actor="ann")
    else:
        world.operations.rollback("heart", actor="ann")
    reconcile_until(world.controller, lambda _: world.stable() == world.v1)
    world.fleet.remove_replica("heart", "heart-1")
    world.fleet.add_replica("heart", "heart-3")
    world.reach_held(world.v1, key)
    world.fleet.pins = set()
    world.reach_held(world.v1)


def test_one_replica_tries_a_candidate_before_the_others_do(world: World) -> None:
    proceed = threading.Event()
    world.fleet.before_load = waiting_for(proceed)
    key = world.stage()
    world.reach(State.VERIFIED)
    settle(world.controller)
    assert world.fleet.held("heart") == {"heart-1": {world.v1}, "heart-2": {world.v1}}
    loads = world.fleet.loads
    proceed.set()
    world.reach(State.WARM)
    assert [load for load in loads if load[1] == key] == [("heart-1", key), ("heart-2", key)]


def test_replicas_that_come_back_or_are_added_get_the_stable_version_and_the_candidate(world: World) -> None:
    key = world.stage()
    world.reach(State.WARM)
    world.operations.canary("heart", 5, actor="ann")
    world.fleet.remove_replica("heart", "heart-1")
    world.fleet.add_replica("heart", "heart-3")
    world.fleet.add_replica("heart", "heart-4")
    world.fleet.loads.clear()
    world.reach_held(world.v1, key)
    assert set(world.fleet.held("heart")) == {"heart-2", "heart-3", "heart-4"}
    # The incumbent came first, everywhere.
    order = [loaded for _, loaded in world.fleet.loads]
    assert order == [world.v1, world.v1, key, key]
    assert world.rollout().state == State.CANARY


def test_automatic_steps_are_taken_in_their_time_and_end_in_promotion(world: World) -> None:
    steps = (
        Step(mode="shadow", percent=10, hold_s=60),
        Step(percent=5, hold_s=100),
        Step(percent=50, hold_s=200),
    )
    key = world.stage(plan=RolloutPlan(steps=steps, promote=True))
    world.reach(State.SHADOW)
    for wait_s, state, percent in ((60, State.CANARY, 5), (100, State.CANARY, 50)):
        world.clock.move(wait_s - 1)
        settle(world.controller, 3)
        assert world.rollout().percent != percent
        world.clock.move(1)
        settle(world.controller, 3)
        assert (world.rollout().state, world.rollout().percent) == (state, percent)
    world.clock.move(200)
    settle(world.controller, 3)
    assert world.rollout().state == State.STABLE
    assert world.stable() == key
    assert actions(world.store.history("heart"))[3:] == ["shadow", "canary", "canary", "promote"]


def test_steps_wait_for_replicas_that_lack_the_candidate(world: World) -> None:
    world.stage(plan=RolloutPlan(steps=(Step(percent=5, hold_s=10),), promote=True))
    world.reach(State.CANARY)
    world.fleet.silent = {"heart-2"}
    world.clock.move(11)
    settle(world.controller)
    assert world.rollout().state == State.CANARY
    world.fleet.silent = set()
    world.reach(State.STABLE)


def test_an_operator_ends_the_automatic_steps(world: World) -> None:
    world.stage(plan=RolloutPlan(steps=(Step(percent=5, hold_s=10),), promote=True))
    world.reach(State.CANARY)
    world.operations.canary("heart", 20, actor="ann")
    world.clock.move(1000)
    settle(world.controller)
    assert (world.rollout().state, world.rollout().percent) == (State.CANARY, 20)


def test_rolling_back_a_candidate_unloads_it(world: World) -> None:
    world.stage()
    world.reach(State.WARM)
    world.operations.canary("heart", 5, actor="ann")
    assert len(world.store.policy().candidates) == 1
    world.operations.rollback("heart", actor="ann", reason="strange answers")
    assert world.store.policy().candidates == ()
    world.reach_held(world.v1)
    assert (world.rollout().state, world.rollout().reason) == (State.ROLLED_BACK, "strange answers")


def test_the_stable_version_is_rolled_back_by_loading_the_one_before_first(world: World) -> None:
    key = world.stage()
    world.reach(State.WARM)
    world.operations.promote("heart", actor="ann")
    world.reach_held(key)
    world.operations.roll_back_stable("heart", key, actor="ann")
    assert world.stable() == key
    reconcile_until(world.controller, lambda _: world.stable() == world.v1)
    assert all(world.v1 in held for held in world.fleet.held("heart").values())
    world.reach_held(world.v1)


def test_a_new_organ_is_brought_and_another_retired_without_touching_the_rest(world: World) -> None:
    world.stage("lung v1", organ="lung")
    world.reach(State.VERIFIED, "lung")
    settle(world.controller)
    assert world.rollout("lung").state == State.VERIFIED
    # Then its application is deployed.
    world.fleet.add_replica("lung", "lung-1")
    world.reach(State.WARM, "lung")
    world.operations.promote("lung", actor="ann")
    assert world.store.policy().stable.organs == ("heart", "liver", "lung")
    world.operations.retire_organ("heart", actor="ann")
    world.reach_held(organ="heart")
    reconcile_until(world.controller, lambda views: views["heart"].empty and not views["liver"].empty)
    assert len(world.fleet.held("liver")["liver-1"]) == 1


def test_several_organs_go_their_ways_at_once(world: World) -> None:
    heart, liver = world.stage("heart v2"), world.stage("liver v2", organ="liver")
    world.reach(State.WARM)
    world.reach(State.WARM, "liver")
    world.operations.promote("liver", actor="ann")
    world.operations.rollback("heart", actor="ann")
    world.reach_held(liver, organ="liver")
    world.reach_held(world.v1)
    assert heart not in world.store.policy().digests


@pytest.mark.parametrize("state", ["staged", "verified", "warm", "shadow", "canary", "stable"])
def test_a_replica_that_dies_at_any_stage_is_replaced_and_the_rollout_goes_on(world: World, state: str) -> None:
    steps = (Step(mode="shadow", percent=5, hold_s=10), Step(percent=5, hold_s=10))
    key = world.stage(plan=RolloutPlan(steps=steps[: {"shadow": 1, "canary": 2, "stable": 2}.get(state, 0)]))
    before = "canary" if state == "stable" else state
    while world.rollout().state != before:
        world.controller.reconcile_once()
        world.clock.move(5 if before == "canary" else 0)
        time.sleep(0.002)
    if state == "stable":
        world.operations.promote("heart", actor="ann")
    world.fleet.remove_replica("heart", "heart-1")
    world.fleet.add_replica("heart", "heart-3")
    if state != "stable":
        reconcile_until(world.controller, lambda views: views["heart"].resident_everywhere(key))
        settle(world.controller)
        world.operations.promote("heart", actor="ann")
    world.reach_held(key)
    assert set(world.fleet.held("heart")) == {"heart-2", "heart-3"}
    assert world.store.verify_history().intact


# The loop.


def test_a_silent_replica_delays_nothing_else(world: World) -> None:
    hang = threading.Event()
    resident = world.fleet.resident
    asked: list[str] = []

    def slow(replica: str, organ: str) -> ReplicaResidents:
        asked.append(replica)
        if replica == "liver-1":
            hang.wait(10)
        return resident(replica, organ)

    world.fleet.resident = slow  # type: ignore[method-assign]
    world.stage()
    started = time.monotonic()
    world.reach(State.WARM)
    # It is waited for once, and not for as long as it is silent; and not asked again before it has answered.
    assert time.monotonic() - started < 8
    assert asked.count("liver-1") == 1
    assert asked.count("liver-2") > 1
    views = world.controller.views
    assert {view.replica: view.problem for view in views["liver"].replicas} == {
        "liver-1": "does not answer",
        "liver-2": "",
    }
    hang.set()


def test_the_thread_follows_changes_and_survives_what_goes_wrong(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = QUICK.model_copy(update={"period_s": 0.05})
    controller = controller_of(world.store, world.fleet, settings, verifier=DigestVerifier(world.fleet))
    snapshot = world.store.snapshot
    troubles = iter([RuntimeError("the disk is full")] * 3)

    def sometimes() -> object:
        for trouble in troubles:
            raise trouble
        return snapshot()

    monkeypatch.setattr(world.store, "snapshot", sometimes)
    controller.start()
    with caplog.at_level(logging.ERROR):
        world.stage()
        until(lambda: world.rollout().state == State.WARM)
    # Three passes failed in the same way, and one of them is logged.
    assert [record.message for record in caplog.records] == [
        "a pass over the rollouts failed; the next one tries again"
    ]
    controller.stop()
    world.operations.rollback("heart", actor="ann")
    time.sleep(0.1)
    assert all(len(held) == 2 for held in world.fleet.held("heart").values())


def test_a_version_that_is_being_unloaded_does_not_count_as_warm(world: World) -> None:
    proceed = threading.Event()
    key = world.stage()
    world.reach(State.WARM)
    world.operations.rollback("heart", actor="ann")
    world.fleet.before_unload = waiting_for(proceed)
    settle(world.controller)
    # Staged again while the replicas still name it.
    world.operations.stage("heart", key, actor="ann")
    settle(world.controller)
    assert world.rollout().state == State.VERIFIED
    proceed.set()
    world.reach(State.WARM)
    assert all(key in held for held in world.fleet.held("heart").values())


def test_many_swaps_leave_one_version_and_a_sound_history(world: World) -> None:
    for number in range(20):
        key = world.stage(f"swap {number}", plan=RolloutPlan(promote=True))
        if number % 5 == 4:
            world.operations.rollback("heart", actor="ann", digest=key)
            world.reach(State.ROLLED_BACK)
        else:
            world.reach(State.STABLE)
            assert world.stable() == key
    world.reach_held(world.stable())
    assert world.store.verify_history().intact
    states = [rollout.state for rollout in world.store.rollouts("heart", limit=None)]
    assert (states.count(State.STABLE), states.count(State.SUPERSEDED), states.count(State.ROLLED_BACK)) == (1, 15, 4)


def test_nothing_is_done_before_a_set_was_adopted(make_url: Callable[[], str], tmp_path: Path) -> None:
    database = Database(make_url())
    controller = controller_of(RolloutStore(database), FolderFleet(tmp_path / "fleet"))
    with pytest.raises(RolloutStateError, match="no live expert set yet"):
        controller.reconcile_once()
    database.close()
