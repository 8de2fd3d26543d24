"""Candidates with gates: evaluated while warm, moved when they passed, refused with the figures when they did not."""

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from router.errors import InvalidRolloutRequestError, RolloutStateError
from router.rollouts import gate_runs
from router.rollouts.gates import Gate
from router.rollouts.operations import RolloutOperations
from router.rollouts.rollout_file import RolloutFile
from router.rollouts.settings import Step
from router.rollouts.states import State
from tests.router.rollouts.gate_support import FileEvaluator, write_scores
from tests.router.rollouts.support import QUICK, actions, controller_of, reconcile_until, settle
from tests.router.rollouts.world import World


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return tmp_path / "held.json"


@pytest.fixture
def evaluator(world: World) -> Iterator[FileEvaluator]:
    """The world's, from now on."""
    evaluator = FileEvaluator()
    restart(world, evaluator)
    world.operations = RolloutOperations(world.store, world.fleet, QUICK, evaluator=evaluator)
    yield evaluator
    world.controller.stop()
    evaluator.proceed.set()


def ran(evaluator: FileEvaluator, times: int, views: object) -> bool:
    return len(evaluator.runs) == times


def restart(world: World, evaluator: FileEvaluator) -> None:
    """Control died, and another one goes on with the same database."""
    world.controller = controller_of(world.store, world.fleet, monitor=world.monitor, evaluator=evaluator)


def gates_of(dataset: Path, at_least: float | None = 0.8, margin: float | None = None) -> tuple[Gate, ...]:
    gate = Gate(
        dataset=str(dataset), metric="attribute_f1", organ="heart", at_least=at_least, not_below_incumbent_by=margin
    )
    return (gate,)


def warm(world: World, name: str = "v2") -> str:
    key = world.stage(name)
    world.reach(State.WARM)
    return key


def apply(world: World, dataset: Path, score: float, *steps: Step, promote: bool = True) -> str:
    """Applies a rollout file with a gate; the candidate gets this score, and the incumbent 0.9."""
    key = world.fleet.push("v2")
    write_scores(dataset, **{key: score, world.v1: 0.9})
    file = RolloutFile(organ="heart", digest=key, steps=steps, promote=promote, gates=gates_of(dataset, 0.8, 0.02))
    assert world.operations.apply(file, lambda organ, version: key, actor="ann").changed
    return key


def evaluated(world: World) -> None:
    reconcile_until(world.controller, lambda _: "evaluate" in actions(world.store.history("heart")))


def test_a_file_goes_on_once_its_gates_are_passed(world: World, evaluator: FileEvaluator, dataset: Path) -> None:
    evaluator.proceed.clear()
    key = apply(world, dataset, 0.91, Step(percent=50, hold_s=0))
    world.reach(State.WARM)
    reconcile_until(world.controller, lambda _: bool(evaluator.runs))
    settle(world.controller)
    rollout = world.rollout()
    assert rollout.state == State.WARM
    assert world.controller.waits_for(rollout.id) == "gate 1 of 1, attribute_f1 of heart, 3 of 10 questions"
    # Routers know the candidate, and give it to no caller.
    (candidate,) = world.store.policy().candidates
    assert (candidate.digest, candidate.mode, candidate.percent) == (key, "shadow", 0)
    evaluator.proceed.set()
    world.reach(State.STABLE)
    assert world.stable() == key
    history = world.store.history("heart")
    assert actions(history) == ["stage", "verify", "warm_up", "evaluate", "canary", "promote"]
    found = history[3].details
    assert found["passed"] is True
    assert (found["value"], found["records"], found["comparison"]["incumbent_value"]) == (0.91, 10, 0.9)
    assert found["dataset_digest"] == found["gate"]["dataset_digest"]
    assert world.store.verify_history().intact


@pytest.mark.parametrize("score", [0.79, 0.82])
def test_a_worse_one_is_refused_with_the_figures_and_can_be_overridden(
    world: World, evaluator: FileEvaluator, dataset: Path, score: float
) -> None:
    key = apply(world, dataset, score)
    evaluated(world)
    settle(world.controller)
    assert world.rollout().state == State.WARM
    assert world.stable() == world.v1
    assert f"{score:.3f}" in world.controller.waits_for(world.rollout().id)
    pattern = rf"did not pass its gates.*is {score:.3f} \[.*incumbent's is 0.900"
    for dry_run in (False, True):
        with pytest.raises(RolloutStateError, match=pattern):
            world.operations.promote("heart", actor="ann", dry_run=dry_run)
    with pytest.raises(RolloutStateError, match=pattern):
        world.operations.canary("heart", 5, actor="ann")
    # No easier gate takes the place of the one that was not passed.
    with pytest.raises(RolloutStateError, match="did not pass its gates"):
        world.operations.promote("heart", actor="ann", gates=gates_of(dataset, 0.1))
    for reason in ("", "  "):
        with pytest.raises(InvalidRolloutRequestError, match="reason"):
            world.operations.promote("heart", actor="ann", override=True, reason=reason)
    assert world.stable() == world.v1
    world.operations.promote("heart", actor="ann", override=True, reason="the board decided")
    assert world.stable() == key
    (promoted,) = [each for each in world.store.history("heart") if each.action == "promote"]
    assert promoted.actor == "ann"
    assert promoted.reason == "the board decided"
    assert f"{score:.3f}" in promoted.details["override"]["not_passed"][0]


def test_promote_with_gates_promotes_by_itself(world: World, evaluator: FileEvaluator, dataset: Path) -> None:
    key = warm(world)
    write_scores(dataset, **{key: 0.9})
    evaluator.proceed.clear()
    assert world.operations.promote("heart", actor="ann", gates=gates_of(dataset), dry_run=True).changed
    assert world.rollout().plan.gates == ()
    assert world.operations.promote("heart", actor="ann", gates=gates_of(dataset)).changed
    reconcile_until(world.controller, lambda _: bool(evaluator.runs))
    # The same once more, by another operator, changes nothing; without gates it has to wait.
    again = world.operations.promote("heart", actor="bob", gates=gates_of(dataset))
    assert not again.changed
    with pytest.raises(RolloutStateError, match=r"has not passed its gates yet.*it is promoted by itself"):
        world.operations.promote("heart", actor="bob")
    evaluator.proceed.set()
    world.reach(State.STABLE)
    assert world.stable() == key
    assert actions(world.store.history("heart")).count("promote") == 1


def test_canary_with_gates_begins_by_itself_and_goes_no_further(
    world: World, evaluator: FileEvaluator, dataset: Path
) -> None:
    key = warm(world)
    write_scores(dataset, **{key: 0.9})
    assert world.operations.canary("heart", 5, actor="ann", gates=gates_of(dataset)).changed
    assert world.reach(State.CANARY).percent == 5
    settle(world.controller)
    assert world.rollout().state == State.CANARY
    world.operations.promote("heart", actor="ann")
    assert world.stable() == key


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_a_dataset_that_is_not_what_was_declared_fails_the_rollout(
    world: World, evaluator: FileEvaluator, dataset: Path, change: str
) -> None:
    evaluator.proceed.clear()
    apply(world, dataset, 0.95)
    reconcile_until(world.controller, lambda _: bool(evaluator.runs))
    if change == "gone":
        dataset.unlink()
    else:
        write_scores(dataset, **{world.rollout().digest: 0.99, world.v1: 0.1})
    evaluator.proceed.set()
    failed = world.reach(State.FAILED)
    assert failed.reason.startswith("gate 1 cannot be evaluated: the dataset")
    assert failed.reason.endswith(change)
    world.reach_held(world.v1)
    assert world.stable() == world.v1
    with world.store.read() as transaction:
        assert not transaction.gate_standing(failed).found


def test_bad_gates_are_refused_before_anything_begins(world: World, evaluator: FileEvaluator, dataset: Path) -> None:
    key = world.fleet.push("v2")
    file = RolloutFile(organ="heart", digest=key, gates=gates_of(dataset))
    with pytest.raises(InvalidRolloutRequestError, match=r"gates\[0\].*is gone"):
        world.operations.apply(file, lambda organ, version: key, actor="ann")
    new = RolloutFile(
        organ="lung",
        digest=key,
        gates=(Gate(dataset=str(dataset), metric="attribute_f1", organ="lung", not_below_incumbent_by=0.1),),
    )
    with pytest.raises(InvalidRolloutRequestError, match="not_below_incumbent_by: needs a stable version"):
        world.operations.apply(new, lambda organ, version: key, actor="ann")
    assert world.store.rollouts() == []
    warm(world)
    with pytest.raises(InvalidRolloutRequestError, match="exclude each other"):
        world.operations.promote("heart", actor="ann", gates=gates_of(dataset), override=True, reason="x")
    write_scores(dataset, **{key: 0.9})
    other = gates_of(dataset)[0].model_copy(update={"organ": "liver"})
    with pytest.raises(InvalidRolloutRequestError, match="the experts of 'heart' are replaced"):
        world.operations.promote("heart", actor="ann", gates=(other,))
    assert world.rollout().plan.gates == ()


def test_without_an_evaluator_gates_are_refused(world: World, dataset: Path) -> None:
    warm(world)
    with pytest.raises(InvalidRolloutRequestError, match="cannot be evaluated by this Control"):
        world.operations.promote("heart", actor="ann", gates=gates_of(dataset))


def test_a_file_that_was_applied_needs_its_dataset_no_more(
    world: World, evaluator: FileEvaluator, dataset: Path
) -> None:
    key = apply(world, dataset, 0.95)
    world.reach(State.STABLE)
    dataset.unlink()
    file = RolloutFile(organ="heart", digest=key, gates=gates_of(dataset, 0.8, 0.02))
    outcome = world.operations.apply(file, lambda organ, version: key, actor="ann")
    assert not outcome.changed


def test_a_rollback_ends_the_evaluation(world: World, evaluator: FileEvaluator, dataset: Path) -> None:
    evaluator.proceed.clear()
    apply(world, dataset, 0.95)
    reconcile_until(world.controller, lambda _: bool(evaluator.runs))
    world.operations.rollback("heart", actor="ann")
    world.reach_held(world.v1)
    reconcile_until(world.controller, lambda _: not threads_of_gates())
    settle(world.controller)
    assert "evaluate" not in actions(world.store.history("heart"))
    assert world.rollout().state == State.ROLLED_BACK


def threads_of_gates() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "position=" in thread.name]


def test_a_killed_control_evaluates_anew(world: World, evaluator: FileEvaluator, dataset: Path) -> None:
    evaluator.proceed.clear()
    key = apply(world, dataset, 0.95)
    reconcile_until(world.controller, lambda _: bool(evaluator.runs))
    world.controller.gates.stop()
    restart(world, evaluator)
    settle(world.controller)
    # What the dead one had asked counts for nothing.
    assert world.rollout().state == State.WARM
    with pytest.raises(RolloutStateError, match="has not passed its gates yet"):
        world.operations.promote("heart", actor="ann")
    evaluator.proceed.set()
    world.reach(State.STABLE)
    assert evaluator.runs == [key, key]
    assert actions(world.store.history("heart")).count("evaluate") == 1


def test_what_was_found_counts_after_a_restart(world: World, evaluator: FileEvaluator, dataset: Path) -> None:
    apply(world, dataset, 0.5)
    evaluated(world)
    restart(world, evaluator)
    settle(world.controller)
    assert len(evaluator.runs) == 1
    with pytest.raises(RolloutStateError, match="did not pass its gates"):
        world.operations.promote("heart", actor="ann")


def test_an_interrupted_evaluation_is_tried_again_and_not_for_ever(
    world: World, evaluator: FileEvaluator, dataset: Path
) -> None:
    evaluator.interruptions = 2
    apply(world, dataset, 0.95)
    for tries in (1, 2, 3):
        reconcile_until(world.controller, partial(ran, evaluator, tries))
        settle(world.controller)
        world.clock.move(gate_runs.RETRY_S)
    world.reach(State.STABLE)

    evaluator.interruptions = gate_runs.MAX_TRIES
    key = world.fleet.push("v3")
    write_scores(dataset, **{key: 0.95})
    world.stage("v3")
    world.reach(State.WARM)
    world.operations.promote("heart", actor="ann", gates=gates_of(dataset))
    for _ in range(gate_runs.MAX_TRIES):
        settle(world.controller)
        world.clock.move(gate_runs.RETRY_S)
    assert world.reach(State.FAILED).reason == "gate 1 cannot be evaluated: no router answers"
