import pytest

from router.errors import UnknownExpertSetError
from router.gating.expert_set import ExpertSet
from router.rollouts.settings import RolloutPlan
from router.rollouts.states import Action
from router.rollouts.store import RolloutStore
from router.rollouts.traffic import given_sets
from tests.router.rollouts.support import digest, set_of


def canary(store: RolloutStore, organ: str, name: str) -> str:
    with store.write() as transaction:
        rollout = transaction.stage(organ, digest(name), RolloutPlan(), actor="ann", reason="")
        for action in (Action.VERIFY, Action.WARM_UP):
            rollout = transaction.move(rollout, action, actor="ann")
        transaction.move(rollout, Action.CANARY, actor="ann", percent=50)
    return rollout.id


def promote(store: RolloutStore, rollout_id: str) -> None:
    with store.write() as transaction:
        transaction.promote(transaction.rollout(rollout_id), actor="ann", max_previous=1)


def test_every_set_that_a_request_could_get_is_known_after_later_promotions(store: RolloutStore) -> None:
    sets = [set_of(breast="a", heart="b", liver="c")]
    first, second = canary(store, "heart", "b2"), canary(store, "liver", "c2")
    sets += [
        set_of(breast="a", heart="b2", liver="c"),
        set_of(breast="a", heart="b", liver="c2"),
        set_of(breast="a", heart="b2", liver="c2"),
    ]
    promote(store, first)
    promote(store, second)
    for round_ in range(5):
        promote(store, canary(store, "heart", f"b{round_ + 3}"))
        sets.append(set_of(breast="a", heart=f"b{round_ + 3}", liver="c2"))
    for expert_set in sets:
        assert store.expert_set(expert_set.id) == expert_set


def test_the_order_of_the_organs_is_kept(store: RolloutStore) -> None:
    promote(store, canary(store, "aorta", "x"))
    live = store.policy().stable
    assert live.organs == ("breast", "heart", "liver", "aorta")
    assert store.expert_set(live.id).organs == live.organs


@pytest.mark.parametrize("wanted", ["", "f" * 64, "no id"])
def test_what_was_never_given_is_not_known(store: RolloutStore, wanted: str) -> None:
    canary_only_staged = set_of(breast="a", heart="b9", liver="c")
    with store.write() as transaction:
        transaction.stage("heart", digest("b9"), RolloutPlan(), actor="ann", reason="")
    for expert_set_id in (wanted, canary_only_staged.id):
        with pytest.raises(UnknownExpertSetError, match="never served"):
            store.expert_set(expert_set_id)


def test_a_database_from_before_begins_with_the_live_set(store: RolloutStore) -> None:
    live: ExpertSet = store.policy().stable
    with store.database.write() as connection:
        connection.exec_driver_sql("DELETE FROM expert_sets")
    assert not store.adopt(live, actor="start")
    assert store.expert_set(live.id) == live


def test_a_policy_gives_the_stable_set_first_and_every_choice_of_canaries(store: RolloutStore) -> None:
    for organ in ("breast", "heart", "liver"):
        canary(store, organ, f"{organ}-2")
    sets = list(given_sets(store.policy()))
    assert sets[0] == store.policy().stable
    assert len({expert_set.id for expert_set in sets}) == 8
