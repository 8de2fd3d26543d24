"""Rollbacks of the candidate and of the stable version, and retirements."""

import pytest

from router.errors import RolloutStateError, UnknownRolloutError
from router.rollouts.operations import RolloutOperations
from router.rollouts.states import State
from router.rollouts.store import RolloutStore
from tests.router.rollouts.operation_steps import staged, to_state, unchanged
from tests.router.rollouts.support import FolderFleet, digest


def test_rolling_back_the_stable_version_brings_back_the_one_before_once_it_is_warm(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet
) -> None:
    first, second = (staged(operations, store, fleet, name, State.STABLE) for name in ("v1", "v2"))
    dry = unchanged(store, lambda: operations.roll_back_stable("heart", second, actor="ann", dry_run=True))
    assert [memory.replica for memory in dry.memory] == ["heart-1", "heart-2"]
    restore = operations.roll_back_stable("heart", second, actor="ann", reason="worse").rollout
    assert restore is not None
    assert (restore.digest, restore.restores, restore.automatic, restore.plan.promote) == (first, True, True, True)
    assert store.policy().stable.bundle_digest("heart") == second
    # While it is under way, asking again is no second rollback, and nothing else is possible but to stop it.
    again = unchanged(store, lambda: operations.roll_back_stable("heart", second, actor="ann"))
    assert (again.changed, again.rollout) == (False, restore)
    assert "is being brought back already: ann asked 0 s ago" in again.steps[0]
    for named in (None, second):
        with pytest.raises(RolloutStateError):
            operations.rollback("heart", actor="bob", digest=named)
    with pytest.raises(RolloutStateError, match="brings back an earlier version"):
        operations.promote("heart", actor="ann")

    to_state(store, fleet, restore.id, State.STABLE)
    live = store.snapshot().live("heart")
    assert live is not None
    assert (live.stable_digest, live.previous) == (first, (digest("b"),))
    by_digest = {rollout.digest: rollout.state for rollout in reversed(store.rollouts("heart"))}
    assert by_digest == {first: State.STABLE, second: State.ROLLED_BACK}
    # The repetition of a call that names its version is harmless.
    again = unchanged(store, lambda: operations.roll_back_stable("heart", second, actor="bob"))
    assert not again.changed
    assert "done already: ann went back from" in again.steps[0]


def test_a_rollback_under_way_can_be_stopped(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet
) -> None:
    first, second = (staged(operations, store, fleet, name, State.STABLE) for name in ("v1", "v2"))
    operations.roll_back_stable("heart", second, actor="ann")
    assert operations.rollback("heart", actor="ann", digest=first).changed
    assert store.snapshot().candidate("heart") is None
    assert store.policy().stable.bundle_digest("heart") == second


def test_rollback_needs_something_to_go_back_to(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet
) -> None:
    with pytest.raises(RolloutStateError, match="has none before it"):
        operations.roll_back_stable("heart", digest("b"), actor="ann")
    with pytest.raises(UnknownRolloutError, match="neither the stable version"):
        operations.rollback("heart", actor="ann", digest=digest("?"))
    staged(operations, store, fleet, "new", State.CANARY)
    with pytest.raises(RolloutStateError, match="roll it back or promote it before going back from the stable version"):
        operations.roll_back_stable("heart", digest("b"), actor="ann")
    with pytest.raises(RolloutStateError, match="which a rollback of the candidate does not touch"):
        operations.rollback("heart", actor="ann", digest=digest("b"))


def test_an_organ_can_be_retired_and_come_back(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet
) -> None:
    operations.retire_organ("heart", actor="ann", reason="not wanted")
    assert store.policy().stable.organs == ("breast", "liver")
    assert "heart" in store.snapshot().known_organs
    with pytest.raises(RolloutStateError, match=r"nothing is in flight for .heart.*heart is not served"):
        operations.rollback("heart", actor="ann")
    key = staged(operations, store, fleet, "new", State.STABLE)
    assert store.policy().stable.organs == ("breast", "liver", "heart")
    assert store.policy().stable.bundle_digest("heart") == key
    assert ("heart", "") not in store.snapshot().retired


def test_the_last_organ_stays(store: RolloutStore, operations: RolloutOperations) -> None:
    for organ in ("breast", "heart"):
        operations.retire_organ(organ, actor="ann")
    with pytest.raises(RolloutStateError, match="the last organ"):
        operations.retire_organ("liver", actor="ann")


def test_a_retired_version_is_neither_staged_nor_gone_back_to(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet
) -> None:
    first, second = (staged(operations, store, fleet, name, State.STABLE) for name in ("v1", "v2"))
    operations.retire_version("heart", first, actor="ann")
    with pytest.raises(RolloutStateError, match="was retired"):
        operations.stage("heart", first, actor="ann")
    assert {rollout.digest: rollout.state for rollout in store.rollouts("heart")}[first] == State.RETIRED
    restored = operations.roll_back_stable("heart", second, actor="ann").rollout
    assert restored is not None
    assert restored.digest == digest("b")
    assert second != restored.digest
