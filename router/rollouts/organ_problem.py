"""Live organs whose stable version is not loaded on every replica, and why."""

from collections.abc import Mapping
from dataclasses import dataclass

from router.rollouts.fleet_view import OrganView, ReplicaView
from router.rollouts.records import Snapshot

# (replica, digest) → why the last load failed.
LoadFailures = Mapping[tuple[str, str], str]


@dataclass(frozen=True, slots=True)
class OrganProblem:
    """A live organ whose stable version is not on every one of its replicas.

    Attributes:
        organ: the organ.
        digest: the stable version's digest.
        replicas: the number of replicas.
        holding: how many replicas hold it; with 0, requests for the organ fail.
        reasons: (replica, reason) for the other replicas; the replica is "" if there is none.
    """

    organ: str
    digest: str
    replicas: int
    holding: int
    reasons: tuple[tuple[str, str], ...]

    @property
    def answers(self) -> bool:
        """Whether any replica can answer requests for the organ."""
        return self.holding > 0


def organ_problems(
    snapshot: Snapshot, views: Mapping[str, OrganView], failures: LoadFailures
) -> tuple[OrganProblem, ...]:
    """The problems of the observed organs.

    Args:
        snapshot: the desired state.
        views: the observed replicas, by organ.
        failures: the loads that failed.
    """
    problems = []
    for live in snapshot.organs:
        view = views.get(live.organ)
        if view is None or view.resident_everywhere(live.stable_digest):
            continue
        digest = live.stable_digest
        missing = [replica for replica in view.replicas if not replica.holds(digest)]
        reasons = tuple((replica.replica, _reason(replica, digest, failures)) for replica in missing)
        if not view.replicas:
            reasons = (("", view.problem or f"no replica of {live.organ!r} is running"),)
        holding = len(view.replicas) - len(missing)
        problems.append(OrganProblem(live.organ, digest, len(view.replicas), holding, reasons))
    return tuple(problems)


def _reason(view: ReplicaView, digest: str, failures: LoadFailures) -> str:
    if view.residents is None:
        return view.problem or "does not answer"
    if digest in view.residents.loading:
        return f"is loading it, {view.residents.loading[digest]:.0%} done"
    return failures.get((view.replica, digest), "has not loaded it yet")
