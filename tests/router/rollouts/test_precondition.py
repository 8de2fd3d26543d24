"""One command, one meaning: what an operation may do when something happened since its caller looked."""

from collections.abc import Callable

import pytest

from router.errors import InvalidRolloutRequestError, RolloutStateError, UnknownRolloutError
from router.rollouts.operations import RolloutOperations
from router.rollouts.outcome import Outcome
from router.rollouts.precondition import Precondition
from router.rollouts.settings import RolloutSettings
from router.rollouts.states import Action, State
from router.rollouts.store import RolloutStore
from tests.router.rollouts.operation_steps import staged, unchanged
from tests.router.rollouts.support import Clock, FolderFleet, digest

VERSIONS = {digest("b"): "1.0.0"}


@pytest.fixture
def operations(store: RolloutStore, fleet: FolderFleet) -> RolloutOperations:
    return RolloutOperations(store, fleet, RolloutSettings(), lambda key: VERSIONS.get(key, ""))


def test_a_rollback_after_the_controller_was_faster_leaves_the_stable_version_alone(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet, clock: Clock
) -> None:
    first = staged(operations, store, fleet, "v1", State.STABLE)
    VERSIONS[first] = "1.1.0"
    VERSIONS[staged(operations, store, fleet, "v2", State.CANARY)] = "1.2.0"
    candidate = store.rollouts("heart", limit=1)[0]
    with store.write() as transaction:
        transaction.move(
            transaction.rollout(candidate.id),
            Action.ROLL_BACK,
            actor="controller",
            reason="3 of 3 requests failed",
        )
    clock.move(6)
    asks: list[Callable[[], Outcome]] = [
        lambda: operations.rollback("heart", actor="ann"),
        lambda: operations.rollback("heart", actor="ann", expected=Precondition(nothing_in_flight=True)),
        # What a client of the version before sent when nothing was in flight.
        lambda: operations.rollback("heart", actor="ann", digest=first),
    ]
    for ask in asks:
        head = store.head()
        with pytest.raises(RolloutStateError) as refused:
            ask()
        assert store.head() == head
        text = str(refused.value)
        assert f"{candidate.id} (1.2.0) was rolled back by the controller 6 s ago: 3 of 3 requests failed" in text
        assert "heart 1.1.0 is stable; to go back from it to 1.0.0:" in text
        assert "`echoray experts rollback heart --stable 1.1.0`" in text
    # Who names the candidate gets what was asked for: it is gone.
    again = unchanged(
        store, lambda: operations.rollback("heart", actor="ann", expected=Precondition(rollout_id=candidate.id))
    )
    assert again.steps == (
        f"done already: {candidate.id} (1.2.0) was rolled back by the controller 6 s ago: 3 of 3 requests failed",
    )


def test_two_operators_who_roll_back_in_turn_take_back_one_version(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet, clock: Clock
) -> None:
    staged(operations, store, fleet, "v1", State.STABLE)
    key = staged(operations, store, fleet, "v2", State.CANARY)
    assert operations.rollback("heart", actor="ann", reason="strange").changed
    clock.move(70)
    with pytest.raises(RolloutStateError, match=r"was rolled back by ann 1 min ago: strange"):
        operations.rollback("heart", actor="bob")
    assert (
        "by ann 1 min ago" in unchanged(store, lambda: operations.rollback("heart", actor="bob", digest=key)).steps[0]
    )


def test_a_candidate_that_somebody_else_staged_since_is_left_alone(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet
) -> None:
    staged(operations, store, fleet, "v1", State.CANARY)
    seen = store.rollouts("heart", limit=1)[0].id
    operations.promote("heart", actor="bob")
    key = staged(operations, store, fleet, "v2", State.WARM)
    other = store.rollouts("heart", limit=1)[0].id
    expected = Precondition(rollout_id=seen)
    asks: list[Callable[[], Outcome]] = [
        lambda: operations.rollback("heart", actor="ann", expected=expected),
        lambda: operations.promote("heart", actor="ann", expected=expected),
        lambda: operations.canary("heart", 5, actor="ann", expected=expected),
        lambda: operations.shadow("heart", 5, actor="ann", expected=expected),
        lambda: operations.rollback("heart", actor="ann", expected=Precondition(nothing_in_flight=True)),
        lambda: operations.promote("heart", actor="ann", expected=Precondition(nothing_in_flight=True)),
    ]
    for ask in asks:
        head = store.head()
        with pytest.raises(RolloutStateError, match=other):
            ask()
        assert store.head() == head
    assert operations.promote("heart", actor="ann", expected=Precondition(rollout_id=other)).changed
    assert store.policy().stable.bundle_digest("heart") == key


def test_a_candidate_that_was_moved_since_is_not_moved_again(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet, clock: Clock
) -> None:
    staged(operations, store, fleet, "v1", State.CANARY)
    candidate = store.rollouts("heart", limit=1)[0]
    operations.canary("heart", 7, actor="bob")
    clock.move(3)
    seen = Precondition(rollout_id=candidate.id, state="canary", percent=5.0)
    moves: list[Callable[[], Outcome]] = [
        lambda: operations.canary("heart", 50, actor="ann", expected=seen),
        lambda: operations.promote("heart", actor="ann", expected=seen),
        lambda: operations.shadow("heart", 50, actor="ann", expected=Precondition(candidate.id, "warm", 0.0)),
    ]
    for ask in moves:
        head = store.head()
        with pytest.raises(RolloutStateError, match=r"it is canary 7 %: .* was made canary 7 % by bob 3 s ago"):
            ask()
        assert store.head() == head
    # As asked already: whatever was seen, nothing is left to do.
    done = unchanged(store, lambda: operations.canary("heart", 7, actor="ann", expected=seen))
    assert "it is canary 7 % already" in done.steps[0]
    assert "by bob 3 s ago" in done.steps[0]
    assert operations.promote("heart", actor="ann", expected=Precondition(candidate.id, "canary", 7.0)).changed
    repeated = unchanged(store, lambda: operations.promote("heart", actor="bob", expected=seen))
    assert "was promoted by ann 0 s ago" in repeated.steps[0]


def test_the_stable_version_is_left_only_if_it_is_the_one_that_is_named(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet
) -> None:
    first, second = (staged(operations, store, fleet, name, State.STABLE) for name in ("v1", "v2"))
    VERSIONS.update({first: "1.1.0", second: "1.2.0"})
    with pytest.raises(RolloutStateError, match=r"1.1.0 is not the stable version of 'heart'.*heart 1.2.0 is stable"):
        operations.roll_back_stable("heart", first, actor="ann")
    with pytest.raises(RolloutStateError, match=r"the caller saw heart 1.1.0 as the stable version"):
        operations.roll_back_stable("heart", second, actor="ann", expected=Precondition(stable_digest=first))
    assert operations.roll_back_stable("heart", second, actor="ann").changed
    # Rolling back what is in flight would undo that; the operator must name it.
    with pytest.raises(RolloutStateError, match=r"brings back 1.1.0, as ann asked 0 s ago; it continues"):
        operations.rollback("heart", actor="bob")


def test_an_organ_is_retired_only_while_it_is_as_it_was_seen(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet, clock: Clock
) -> None:
    staged(operations, store, fleet, "v1", State.STABLE)
    seen = Precondition(stable_digest=digest("b"))
    retirements: list[Callable[[], Outcome]] = [
        lambda: operations.retire_organ("heart", actor="ann", expected=seen),
        lambda: operations.retire_version("heart", digest("b"), actor="ann", expected=seen),
    ]
    for ask in retirements:
        with pytest.raises(RolloutStateError, match=r"the caller saw heart 1.0.0 as the stable version.*promoted by"):
            ask()
    operations.retire_version("heart", digest("b"), actor="bob", reason="labels")
    clock.move(5)
    again = unchanged(store, lambda: operations.retire_version("heart", digest("b"), actor="ann"))
    assert again.steps == ("1.0.0 was retired by bob 5 s ago: labels already; nothing to do",)
    operations.retire_organ("heart", actor="ann", reason="gone")
    assert (
        "retired by ann 0 s ago: gone" in unchanged(store, lambda: operations.retire_organ("heart", actor="b")).steps[0]
    )


def test_a_rollout_that_there_is_not_is_told(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet
) -> None:
    staged(operations, store, fleet, "v1", State.CANARY)
    rollout = store.rollouts("heart", limit=1)[0].id
    with pytest.raises(UnknownRolloutError, match="heart-99"):
        operations.rollback("heart", actor="ann", expected=Precondition(rollout_id="heart-99"))
    with pytest.raises(InvalidRolloutRequestError, match="is a rollout of 'heart'"):
        operations.rollback("liver", actor="ann", expected=Precondition(rollout_id=rollout))
