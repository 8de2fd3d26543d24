from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from router.gating.expert_set import ExpertSet, ExpertSetMember
from router.rollouts.database import Database
from router.rollouts.fleet import ReplicaResidents
from router.rollouts.fleet_view import FleetObserver
from router.rollouts.settings import RolloutPlan
from router.rollouts.store import RolloutStore
from tests.router.rollouts.support import FolderFleet

ORGANS = ("heart", "liver")


class CountingFleet(FolderFleet):
    """Counts how often each organ's replicas are asked."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: Counter[str] = Counter()

    def resident(self, replica: str, organ: str) -> ReplicaResidents:
        self.asked[organ] += 1
        return super().resident(replica, organ)


@pytest.fixture
def fleet(tmp_path: Path) -> CountingFleet:
    found = CountingFleet(tmp_path / "fleet")
    for organ in ORGANS:
        found.add_replica(organ, f"{organ}-1")
        found.load(f"{organ}-1", organ, found.push(organ, 100), 1.0)
    return found


@pytest.fixture
def store(tmp_path: Path, fleet: CountingFleet) -> Iterator[RolloutStore]:
    database = Database(f"sqlite:///{tmp_path}/rollouts.db")
    store = RolloutStore(database)
    members = tuple(ExpertSetMember(organ=organ, bundle_digest=fleet.push(organ, 100)) for organ in ORGANS)
    store.adopt(ExpertSet(backbone_digest="b", routing="organs", members=members), actor="start")
    yield store
    database.close()


def look(observer: FleetObserver, store: RolloutStore, recent_s: float = 60.0) -> dict[str, set[str]]:
    """Organ → what all its replicas together hold."""
    views = observer.observe(store.snapshot(), ORGANS, recent_s=recent_s)
    return {
        organ: {digest for replica in view.replicas for digest in (replica.residents or NOTHING).bytes_by_digest}
        for organ, view in views.items()
    }


NOTHING = ReplicaResidents({}, 0)


def test_organs_that_nothing_happens_to_are_spared(fleet: CountingFleet, store: RolloutStore) -> None:
    observer = FleetObserver(fleet, 5.0)
    first = look(observer, store)
    assert all(len(held) == 1 for held in first.values())
    with store.write() as transaction:
        transaction.stage("heart", fleet.push("other", 100), RolloutPlan(), actor="tests", reason="")
    assert look(observer, store) == look(observer, store) == first
    assert fleet.asked == {"heart": 3, "liver": 1}
    # Old news is no news.
    assert look(observer, store, recent_s=0.0) == first
    assert fleet.asked == {"heart": 4, "liver": 2}


def test_what_is_not_as_it_shall_be_is_asked_again(fleet: CountingFleet, store: RolloutStore) -> None:
    observer = FleetObserver(fleet, 5.0)
    extra = fleet.push("extra", 100)
    fleet.load("liver-1", "liver", extra, 1.0)
    assert extra in look(observer, store)["liver"]
    fleet.unload("liver-1", "liver", extra)
    assert extra not in look(observer, store)["liver"]
    assert fleet.asked == {"heart": 1, "liver": 2}


def test_a_new_replica_is_asked_at_once(fleet: CountingFleet, store: RolloutStore) -> None:
    observer = FleetObserver(fleet, 5.0)
    look(observer, store)
    fleet.add_replica("liver", "liver-2")
    look(observer, store)
    assert fleet.asked == {"heart": 1, "liver": 3}


def test_a_retired_organ_is_asked_until_it_is_gone(fleet: CountingFleet, store: RolloutStore) -> None:
    observer = FleetObserver(fleet, 5.0)
    look(observer, store)
    with store.write() as transaction:
        transaction.retire_organ("liver", actor="tests", reason="")
    look(observer, store)
    look(observer, store)
    assert fleet.asked == {"heart": 1, "liver": 3}
