from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from echovlm_ray.serving.control.organs import OrganApplications
from router.gating.expert_set import ExpertSet, ExpertSetMember
from router.rollouts.database import Database
from router.rollouts.fleet import ReplicaResidents
from router.rollouts.fleet_view import OrganView, ReplicaView
from router.rollouts.settings import RolloutPlan
from router.rollouts.states import Action
from router.rollouts.store import RolloutStore
from tests.waiting import until


@dataclass
class World:
    """What Serve would know."""

    store: RolloutStore
    applications: set[str] = field(default_factory=lambda: {"heart", "liver"})
    views: dict[str, OrganView] = field(default_factory=dict)
    watched: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    organs: OrganApplications = field(init=False)

    def __post_init__(self) -> None:
        self.organs = OrganApplications(
            self.store,
            lambda: self.views,
            self.deployed,
            self.applications.add,
            self.applications.remove,
            self.watched.add,
        )

    def deployed(self) -> set[str]:
        self.asked.append("applications")
        return set(self.applications)

    def holds(self, organ: str, *digests: str) -> None:
        residents = ReplicaResidents(dict.fromkeys(digests, 1), 10)
        self.views[organ] = OrganView(organ, (ReplicaView(f"{organ}-1", residents),))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    database = Database(f"sqlite:///{tmp_path}/rollouts.db")
    store = RolloutStore(database)
    members = tuple(ExpertSetMember(organ=organ, bundle_digest=organ[0] * 64) for organ in ("heart", "liver"))
    store.adopt(ExpertSet(backbone_digest="b", routing="organs", members=members), actor="start")
    yield World(store)
    database.close()


def test_a_new_organ_runs_from_when_it_is_staged_until_it_is_taken_back_and_empty(world: World) -> None:
    assert world.organs.pass_once()
    assert world.watched == {"heart", "liver"}
    with world.store.write() as transaction:
        rollout = transaction.stage("lung", "a" * 64, RolloutPlan(), actor="tests", reason="")
    assert world.organs.pass_once()
    assert world.applications == {"heart", "liver", "lung"}
    assert "lung" in world.watched
    with world.store.write() as transaction:
        transaction.move(rollout, Action.FAIL, actor="tests")
    world.holds("lung", "a" * 64)
    assert not world.organs.pass_once()
    assert "lung" in world.applications
    world.holds("lung")
    world.organs.pass_once()
    assert world.applications == {"heart", "liver"}
    assert world.organs.pass_once()


def test_serve_is_not_asked_about_an_organ_that_has_replicas(world: World) -> None:
    with world.store.write() as transaction:
        transaction.stage("heart", "a" * 64, RolloutPlan(), actor="tests", reason="")
    world.holds("heart", "h" * 64)
    assert world.organs.pass_once()
    assert not world.asked
    world.views["heart"] = OrganView("heart", ())
    assert world.organs.pass_once()
    assert len(world.asked) == 1


def test_an_organ_that_comes_back_while_its_last_replica_leaves_is_started_anew(world: World) -> None:
    """Serve takes a while to end an application, and its replicas are seen until then."""
    world.holds("liver")
    with world.store.write() as transaction:
        transaction.retire_organ("liver", actor="tests", reason="")
    world.organs.pass_once()
    assert world.applications == {"heart"}
    with world.store.write() as transaction:
        transaction.stage("liver", "a" * 64, RolloutPlan(), actor="tests", reason="")
    world.organs.pass_once()
    assert world.applications == {"heart", "liver"}


def test_a_retired_organ_ends_once_no_replica_holds_anything(world: World) -> None:
    world.holds("liver", "l" * 64)
    with world.store.write() as transaction:
        transaction.retire_organ("liver", actor="tests", reason="")
    assert not world.organs.pass_once()
    world.views["liver"] = OrganView("liver", (ReplicaView("liver-1", None, "does not answer"),))
    assert not world.organs.pass_once()
    world.holds("liver")
    world.organs.pass_once()
    assert world.applications == {"heart"}


def test_what_is_live_and_not_in_flight_is_started_by_others(world: World) -> None:
    world.applications.clear()
    assert world.organs.pass_once()
    assert not world.applications


def test_the_thread_follows_every_change(world: World) -> None:
    world.organs.start()
    with world.store.write() as transaction:
        transaction.stage("lung", "a" * 64, RolloutPlan(), actor="tests", reason="")
    until(lambda: "lung" in world.applications)
    world.organs.stop()
