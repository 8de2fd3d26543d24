from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from echovlm_ray.serving.control.state import MAX_READS, StateReader
from router.gating.expert_set import ExpertSet, ExpertSetMember
from router.rollouts.database import Database
from router.rollouts.fleet import ReplicaResidents
from router.rollouts.settings import RolloutPlan
from router.rollouts.states import Action
from router.rollouts.store import RolloutStore
from tests.router.rollouts.support import FolderFleet, controller_of


class BusyFleet(FolderFleet):
    """Something happens whenever its replica is asked."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.meanwhile: Callable[[], None] = lambda: None

    def resident(self, replica: str, organ: str) -> ReplicaResidents:
        self.meanwhile()
        return super().resident(replica, organ)


@pytest.fixture
def fleet(tmp_path: Path) -> BusyFleet:
    fleet = BusyFleet(tmp_path / "fleet")
    fleet.add_replica("heart", "heart-1", fleet.push("old"))
    return fleet


@pytest.fixture
def store(tmp_path: Path, fleet: BusyFleet) -> Iterator[RolloutStore]:
    database = Database(f"sqlite:///{tmp_path}/rollouts.db")
    store = RolloutStore(database)
    members = (ExpertSetMember(organ="heart", bundle_digest=fleet.push("old")),)
    store.adopt(ExpertSet(backbone_digest="b", routing="organs", members=members), actor="start")
    yield store
    database.close()


def stage(store: RolloutStore, digest: str) -> None:
    with store.write() as transaction:
        transaction.stage("heart", digest, actor="ann", reason="", plan=RolloutPlan())


def reader_of(store: RolloutStore, fleet: BusyFleet) -> StateReader:
    return StateReader(store, fleet, lambda digest: "1.1.0", 5.0, controller_of(store, fleet))


def test_a_load_is_not_seen_before_what_allowed_it(store: RolloutStore, fleet: BusyFleet) -> None:
    candidate = fleet.push("new")
    stage(store, candidate)

    def verified_and_loaded() -> None:
        fleet.meanwhile = lambda: None
        with store.write() as transaction:
            transaction.move(transaction.rollouts(organ="heart")[0], Action.VERIFY, actor="control")
        fleet.load("heart-1", "heart", candidate, 1.0)

    fleet.meanwhile = verified_and_loaded
    state = reader_of(store, fleet).read()
    assert candidate in {bundle.digest for replica in state.replicas for bundle in replica.bundles}
    assert [rollout.state for rollout in state.rollouts] == ["verified"]


def test_a_state_that_never_stands_still_is_given_all_the_same(store: RolloutStore, fleet: BusyFleet) -> None:
    asked = []

    def one_more() -> None:
        asked.append(store.head().count)
        with store.write() as transaction:
            if candidate := transaction.rollouts(organ="heart", limit=1):
                transaction.move(candidate[0], Action.FAIL, actor="control", reason="no")
            transaction.stage("heart", fleet.push(str(len(asked))), actor="ann", reason="", plan=RolloutPlan())

    fleet.meanwhile = one_more
    state = reader_of(store, fleet).read("heart")
    assert len(asked) == MAX_READS
    assert state.version == asked[-1]
