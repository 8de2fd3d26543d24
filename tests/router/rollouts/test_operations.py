"""Beginning rollouts and bringing candidates into traffic."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experts.errors import UnknownBundleError
from router.errors import InvalidRolloutRequestError, RolloutStateError, UnknownOrganError
from router.rollouts.operations import RolloutOperations
from router.rollouts.outcome import Outcome
from router.rollouts.rollout_file import RolloutFile
from router.rollouts.settings import RolloutPlan, RolloutSettings, Step, Thresholds
from router.rollouts.states import IN_FLIGHT, State
from router.rollouts.store import RolloutStore
from router.rollouts.traffic import TrafficPolicy
from tests.router.rollouts.operation_steps import staged, to_state, unchanged
from tests.router.rollouts.support import Clock, FolderFleet, actions, digest, set_of


def test_staging_begins_a_rollout_and_gives_it_no_traffic(
    store: RolloutStore, operations: RolloutOperations, new: str
) -> None:
    policy = store.policy()
    outcome = operations.stage("heart", new, actor="ann", reason="finer valves")
    rollout = outcome.rollout
    assert outcome.changed
    assert rollout is not None
    assert (rollout.state, rollout.digest, rollout.incumbent_digest) == (State.STAGED, new, digest("b"))
    assert (rollout.actor, rollout.reason, rollout.automatic) == ("ann", "finer valves", False)
    assert store.rollout(rollout.id) == rollout
    entry = store.history("heart")[-1]
    assert (entry.action, entry.actor, entry.reason, entry.digest) == ("stage", "ann", "finer valves", new)
    assert store.policy() == policy.model_copy(update={"version": policy.version + 1})


def test_a_rollout_keeps_the_settings_of_its_day(operations: RolloutOperations, new: str) -> None:
    plan = RolloutPlan(thresholds=Thresholds(min_requests=7))
    rollout = operations.stage("heart", new, actor="ann", plan=plan).rollout
    assert rollout is not None
    assert rollout.plan.thresholds == Thresholds(min_requests=7)
    assert rollout.plan.warm_timeout_s == RolloutSettings().warm_timeout_s


def test_asking_for_what_already_is_changes_nothing(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet
) -> None:
    assert not unchanged(store, lambda: operations.stage("heart", digest("b"), actor="ann")).changed
    key = staged(operations, store, fleet, "new", State.WARM)
    assert not unchanged(store, lambda: operations.stage("heart", key, actor="ann")).changed
    asks: list[Callable[[], Outcome]] = [
        lambda: operations.shadow("heart", 5, actor="ann"),
        lambda: operations.canary("heart", 5, actor="ann"),
        lambda: operations.promote("heart", actor="ann"),
    ]
    for ask in asks:
        assert ask().changed
        again = unchanged(store, ask)
        assert not again.changed
        assert again.rollout is not None
        assert again.rollout.digest == key
    old = digest("b")
    asks = [
        lambda: operations.retire_version("heart", old, actor="ann"),
        lambda: operations.retire_organ("heart", actor="ann"),
    ]
    for ask in asks:
        assert ask().changed
        assert not unchanged(store, ask).changed
    assert store.verify_history().intact


def test_a_dry_run_touches_nothing_and_says_what_would_happen(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet, new: str
) -> None:
    plan = RolloutPlan(steps=(Step(percent=5, hold_s=60),), promote=True)
    outcome = unchanged(store, lambda: operations.stage("heart", new, actor="ann", plan=plan, dry_run=True))
    assert outcome.changed
    assert outcome.steps == (
        "the bundle is read and verified",
        "it is loaded on every replica of heart; no request uses it yet",
        "it answers 5 % of the requests for 60 s and until 20 of them succeeded",
        "it becomes stable, unless its thresholds took it back before",
        "for 600 s the version before is kept to go back to",
    )
    assert [(m.replica, m.resident_bytes, m.needed_bytes, m.limit_bytes, m.fits) for m in outcome.memory] == [
        ("heart-1", 0, 100, 1000, True),
        ("heart-2", 0, 100, 1000, True),
    ]
    for state in (State.WARM, State.SHADOW, State.CANARY):
        staged(operations, store, fleet, f"of {state}", state)
        asks: list[Callable[[], Outcome]] = [
            lambda: operations.canary("heart", 17, actor="ann", dry_run=True),
            lambda: operations.shadow("heart", 17, actor="ann", dry_run=True),
            lambda: operations.promote("heart", actor="ann", dry_run=True),
            lambda: operations.rollback("heart", actor="ann", dry_run=True),
        ]
        for ask in asks:
            assert unchanged(store, ask).changed
        operations.rollback("heart", actor="ann")
    asks = [
        lambda: operations.retire_organ("liver", actor="ann", dry_run=True),
        lambda: operations.retire_version("heart", new, actor="ann", dry_run=True),
    ]
    for ask in asks:
        assert unchanged(store, ask).changed


def test_a_dry_run_shows_every_replica_against_its_limit(
    operations: RolloutOperations, fleet: FolderFleet, new: str
) -> None:
    fleet.load("heart-1", "heart", fleet.push("large", 950), 1)
    fleet.load("heart-2", "heart", new, 1)
    memory = operations.stage("heart", new, actor="ann", dry_run=True).memory
    assert [(m.resident_bytes, m.needed_bytes, m.fits) for m in memory] == [(950, 100, False), (100, 0, True)]
    with pytest.raises(UnknownBundleError):
        operations.stage("heart", digest("never pushed"), actor="ann", dry_run=True)


def test_a_dry_run_raises_what_the_real_one_raises(
    store: RolloutStore, operations: RolloutOperations, new: str
) -> None:
    operations.stage("heart", new, actor="ann")
    asks: list[Callable[..., Outcome]] = [
        lambda **kw: operations.stage("heart", digest("other"), actor="ann", **kw),
        lambda **kw: operations.canary("heart", 5, actor="ann", **kw),
        lambda **kw: operations.shadow("heart", 5, actor="ann", **kw),
        lambda **kw: operations.promote("heart", actor="ann", **kw),
        lambda **kw: operations.rollback("liver", actor="ann", **kw),
        lambda **kw: operations.retire_organ("heart", actor="ann", **kw),
        lambda **kw: operations.retire_version("heart", new, actor="ann", **kw),
        lambda **kw: operations.retire_version("heart", digest("b"), actor="ann", **kw),
    ]
    for ask in asks:
        texts = []
        for dry_run in (True, False):
            before = store.head()
            with pytest.raises(RolloutStateError) as raised:
                ask(dry_run=dry_run)
            texts.append(str(raised.value))
            assert store.head() == before
        assert texts[0] == texts[1]


def test_wrong_transitions_name_the_state_and_what_is_possible(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet, new: str
) -> None:
    with pytest.raises(RolloutStateError, match=r"nothing is in flight for 'heart', so canary .*possible: stage"):
        operations.canary("heart", 5, actor="ann")
    operations.stage("heart", new, actor="ann")
    with pytest.raises(RolloutStateError, match=r"is staged, so promote is not possible; possible: rollback, and more"):
        operations.promote("heart", actor="ann")
    with pytest.raises(RolloutStateError, match=r"is staged, so no other can begin; promote it or roll it back first"):
        operations.stage("heart", digest("other"), actor="ann")
    operations.rollback("heart", actor="ann", reason="wrong file")
    with pytest.raises(RolloutStateError, match=r"heart-2 .* was rolled back by ann 0 s ago: wrong file"):
        operations.promote("heart", actor="ann")


def test_a_candidate_that_a_replica_lacks_gets_no_traffic(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet
) -> None:
    key = staged(operations, store, fleet, "new", State.WARM)
    fleet.unload("heart-2", "heart", key)
    with pytest.raises(RolloutStateError, match="not loaded on heart-2 of 2 replicas"):
        operations.promote("heart", actor="ann")
    for replica in ("heart-1", "heart-2"):
        fleet.remove_replica("heart", replica)
    with pytest.raises(RolloutStateError, match="no replica of 'heart' is running"):
        operations.canary("heart", 5, actor="ann")


def test_promotion_is_one_step_for_the_policy(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet
) -> None:
    seen: list[TrafficPolicy] = []
    staged(operations, store, fleet, "new", State.CANARY)
    store.subscribe(lambda: seen.append(store.policy()))
    operations.promote("heart", actor="ann")
    (policy,) = seen
    assert policy.candidates == ()
    assert [member.organ for member in policy.stable.members] == ["breast", "heart", "liver"]
    assert policy.stable.bundle_digest("heart") == fleet.push("new")
    assert policy.stable.bundle_digest("breast") == digest("a")


def test_who_subscribes_first_hears_of_a_change_before_all_others(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet
) -> None:
    heard: list[str] = []
    store.subscribe(lambda: heard.append("usual"))
    end = store.subscribe(lambda: heard.append("first"), first=True)
    operations.stage("heart", fleet.push("new"), actor="ann")
    assert heard == ["first", "usual"]
    end()
    operations.rollback("heart", actor="ann")
    assert heard == ["first", "usual", "usual"]


def test_at_most_one_rollout_per_organ_is_stable_and_it_is_the_live_one(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet
) -> None:
    keys = [staged(operations, store, fleet, name, State.STABLE) for name in ("v1", "v2", "v3", "v4")]
    states = {rollout.digest: rollout.state for rollout in store.rollouts("heart")}
    assert states == {**dict.fromkeys(keys[:3], State.SUPERSEDED), keys[3]: State.STABLE}
    live = store.snapshot().live("heart")
    assert live is not None
    # Three are remembered.
    assert (live.stable_digest, live.previous) == (keys[3], tuple(keys[:3]))


def test_operations_can_name_the_candidate_that_they_mean(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet
) -> None:
    key = staged(operations, store, fleet, "new", State.WARM)
    asks: list[Callable[..., Outcome]] = [
        lambda **kw: operations.canary("heart", 5, actor="ann", **kw),
        lambda **kw: operations.shadow("heart", 5, actor="ann", **kw),
        lambda **kw: operations.promote("heart", actor="ann", **kw),
    ]
    for ask in asks:
        with pytest.raises(RolloutStateError, match=r"asked for the bundle .* is in flight"):
            ask(digest=digest("another"))
    assert operations.canary("heart", 5, actor="ann", digest=key).changed


def test_a_new_organ_joins_the_live_set_at_its_end(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet
) -> None:
    with pytest.raises(UnknownOrganError, match="there are breast, heart, liver"):
        operations.canary("lung", 5, actor="ann")
    plan = RolloutPlan(steps=(Step(mode="shadow", percent=5, hold_s=1),))
    with pytest.raises(RolloutStateError, match="is new and has no version that a shadow could be compared with"):
        operations.stage("lung", fleet.push("lung"), actor="ann", plan=plan)
    key = staged(operations, store, fleet, "lung", State.WARM, organ="lung")
    with pytest.raises(RolloutStateError, match="is new"):
        operations.shadow("lung", 5, actor="ann")
    operations.canary("lung", 5, actor="ann")
    assert store.policy().organs == ("breast", "heart", "liver", "lung")
    operations.promote("lung", actor="ann")
    assert store.policy().stable.organs == ("breast", "heart", "liver", "lung")
    assert store.policy().stable.bundle_digest("lung") == key


@pytest.mark.parametrize(
    ("field", "ask"),
    [
        ("percent", lambda o: o.canary("heart", 0, actor="ann")),
        ("percent", lambda o: o.canary("heart", 100.1, actor="ann")),
        ("percent", lambda o: o.shadow("heart", float("nan"), actor="ann")),
        ("actor", lambda o: o.promote("heart", actor="  ")),
        ("actor", lambda o: o.rollback("heart", actor="a\nb")),
        ("actor", lambda o: o.retire_organ("heart", actor="x" * 201)),
        ("organ", lambda o: o.stage("../heart", "0" * 64, actor="ann")),
        ("digest", lambda o: o.stage("heart", "latest", actor="ann")),
        ("digest", lambda o: o.retire_version("heart", "A" * 64, actor="ann")),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, field: str, ask: Callable[[RolloutOperations], Any]) -> None:
    # Before anything is looked up: there is no store at all.
    with pytest.raises(InvalidRolloutRequestError) as raised:
        ask(RolloutOperations(None, FolderFleet(tmp_path), RolloutSettings()))  # type: ignore[arg-type]
    assert raised.value.field == field


def test_a_rollout_file_is_applied_once(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet, new: str
) -> None:
    file = RolloutFile(organ="heart", version="2.0.0", steps=(Step(percent=5, hold_s=60),), reason="finer")
    versions = {("heart", "2.0.0"): new}
    resolve = lambda organ, version: versions[organ, version]  # noqa: E731

    def apply(changed: RolloutFile = file) -> Outcome:
        return operations.apply(changed, resolve, actor="ann")

    assert unchanged(store, lambda: operations.apply(file, resolve, actor="ann", dry_run=True)).changed
    first = apply()
    assert first.rollout is not None
    assert (first.rollout.plan.steps, first.rollout.automatic) == (file.steps, True)
    for state in (State.WARM, State.ROLLED_BACK):
        to_state(store, fleet, first.rollout.id, state)
        again = unchanged(store, apply)
        assert again.rollout is not None
        assert again.rollout.id == first.rollout.id
        assert f"is {state}" in again.steps[0]
        if state == State.WARM:
            # The same bundle named by its digest is the same file.
            named = RolloutFile(**{**file.model_dump(exclude={"version"}), "digest": new})
            assert not unchanged(store, lambda: apply(named)).changed  # noqa: B023
            with pytest.raises(RolloutStateError, match="is warm, so no other can begin"):
                apply(file.model_copy(update={"reason": "another"}))
    assert "raise `attempt`" in again.steps[0]
    second = apply(file.model_copy(update={"attempt": 2}))
    assert second.changed
    assert second.rollout is not None
    assert second.rollout.id != first.rollout.id
    assert actions(store.history("heart")).count("stage") == 2


def test_a_file_whose_version_is_stable_changes_nothing(store: RolloutStore, operations: RolloutOperations) -> None:
    file = RolloutFile(organ="heart", digest=digest("b"))
    assert not unchanged(store, lambda: operations.apply(file, _never, actor="ann")).changed


def _never(organ: str, version: str) -> str:
    raise AssertionError


def test_adopting_keeps_what_the_database_has(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet
) -> None:
    staged(operations, store, fleet, "new", State.STABLE)
    before = store.snapshot()
    assert not store.adopt(set_of(breast="a", heart="b", liver="c"), actor="start")
    assert store.snapshot() == before
    other = set_of(breast="a").model_copy(update={"backbone_digest": "e" * 64})
    with pytest.raises(RolloutStateError, match=r"belongs to the backbone ffffffffffff… .*give another database"):
        store.adopt(other, actor="start")
    with pytest.raises(RolloutStateError, match="'organs' routing"):
        store.adopt(set_of(routing="flat", breast="a"), actor="start")


def test_several_organs_are_in_flight_at_once(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet, clock: Clock
) -> None:
    for organ in ("breast", "heart", "liver"):
        clock.move(1)
        operations.stage(organ, fleet.push(f"{organ} 2"), actor="ann")
    snapshot = store.snapshot()
    assert {rollout.organ for rollout in snapshot.in_flight} == {"breast", "heart", "liver"}
    assert all(rollout.state in IN_FLIGHT for rollout in snapshot.in_flight)
    first = snapshot.candidate("breast")
    assert first is not None
    assert replace(first, state=State.WARM).in_flight


def test_a_reason_is_kept_as_one_bounded_line(store: RolloutStore, operations: RolloutOperations, new: str) -> None:
    operations.stage("heart", new, actor="ann", reason="two\nlines \x00" + "x" * 1000)
    kept = store.history("heart")[-1].reason
    assert kept == store.rollouts("heart")[0].reason
    assert kept.startswith("two lines xxx")
    assert len(kept) == 500


def test_of_two_who_promote_at_once_one_does(
    store: RolloutStore, operations: RolloutOperations, fleet: FolderFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = staged(operations, store, fleet, "new", State.WARM)
    other = RolloutOperations(store, FolderFleet(fleet.root), RolloutSettings())
    replicas = fleet.replicas

    def meanwhile(organ: str) -> Sequence[str]:
        # Between the check of the replicas and the transaction.
        other.promote("heart", actor="bob")
        return replicas(organ)

    monkeypatch.setattr(fleet, "replicas", meanwhile)
    assert not operations.promote("heart", actor="ann").changed
    assert [entry.actor for entry in store.history("heart") if entry.action == "promote"] == ["bob"]
    assert store.policy().stable.bundle_digest("heart") == key
