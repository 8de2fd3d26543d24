"""What cannot be answered, and why, from what should be and what is."""

from pathlib import Path

from router.rollouts.fleet import ReplicaResidents
from router.rollouts.fleet_view import OrganView, ReplicaView
from router.rollouts.organ_problem import organ_problems
from router.rollouts.records import Snapshot
from router.rollouts.store import RolloutStore
from tests.router.rollouts.support import reconcile_until
from tests.router.rollouts.world import World

LIMIT = 10**6


def holding(replica: str, *digests: str) -> ReplicaView:
    return ReplicaView(replica, ReplicaResidents(dict.fromkeys(digests, 1), LIMIT))


def views_of(snapshot: Snapshot, **replicas: tuple[ReplicaView, ...]) -> dict[str, OrganView]:
    """All other organs are well."""
    well = {live.organ: (holding("r", live.stable_digest),) for live in snapshot.organs}
    return {organ: OrganView(organ, views) for organ, views in (well | replicas).items()}


def test_nothing_is_said_where_every_replica_holds_what_is_stable(store: RolloutStore) -> None:
    snapshot = store.snapshot()
    assert organ_problems(snapshot, views_of(snapshot), {}) == ()


def test_each_replica_says_why_it_lacks_the_stable_version(store: RolloutStore) -> None:
    snapshot = store.snapshot()
    live = snapshot.live("heart")
    assert live is not None
    digest = live.stable_digest
    replicas = (
        holding("r1", digest),
        holding("r2", "another"),
        ReplicaView("r3", ReplicaResidents({}, LIMIT, {digest: 0.4})),
        ReplicaView("r4", None, "does not answer"),
        holding("r5"),
    )
    failures = {("r2", digest): "the registry has no bundle", ("r2", "another"): "of no account"}
    (problem,) = organ_problems(snapshot, views_of(snapshot, heart=replicas), failures)
    assert (problem.organ, problem.digest, problem.replicas, problem.holding) == ("heart", digest, 5, 1)
    assert problem.answers
    assert problem.reasons == (
        ("r2", "the registry has no bundle"),
        ("r3", "is loading it, 40% done"),
        ("r4", "does not answer"),
        ("r5", "has not loaded it yet"),
    )


def test_an_organ_without_replicas_or_without_one_that_holds_it_cannot_be_answered(store: RolloutStore) -> None:
    snapshot = store.snapshot()
    views = views_of(snapshot, heart=(), liver=(holding("r1"),))
    heart, liver = organ_problems(snapshot, views, {})
    assert (heart.answers, heart.reasons) == (False, (("", "no replica of 'heart' is running"),))
    assert not liver.answers


def test_a_load_that_fails_is_told_until_it_succeeds(world: World, tmp_path: Path) -> None:
    def fail(replica: str, key: str) -> None:
        raise OSError("the registry is away")

    world.fleet.before_load = fail
    world.fleet.add_replica("heart", "heart-3")
    place = ("heart-3", world.v1)
    reconcile_until(world.controller, lambda _: place in world.controller.load_failures())
    (problem,) = organ_problems(world.store.snapshot(), world.controller.views, world.controller.load_failures())
    assert (problem.holding, problem.replicas) == (2, 3)
    assert problem.reasons[0][0] == "heart-3"
    assert "the registry is away" in problem.reasons[0][1]
    world.fleet.before_load = lambda replica, key: None
    # Past the pause between tries.
    world.clock.move(60)
    reconcile_until(world.controller, lambda _: place not in world.controller.load_failures())
    reconcile_until(world.controller, lambda views: views["heart"].resident_everywhere(world.v1))
