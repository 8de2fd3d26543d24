"""Brings every replica to hold what it should: the stable version, the candidate, and what is still in use."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from experts.errors import ExpertCapacityError
from router.rollouts.background import Background
from router.rollouts.fleet import Fleet
from router.rollouts.fleet_view import OrganView, ReplicaView
from router.rollouts.moments import Moments
from router.rollouts.outcome import format_error
from router.rollouts.records import Rollout, Snapshot
from router.rollouts.states import RESIDENT, State

LONGEST_PAUSE_S = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Operation:
    """A load or an unload; also its key among the calls under way."""

    kind: Literal["load", "unload"]
    organ: str
    replica: str
    digest: str


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """A load that did not succeed.

    Attributes:
        operation: the load.
        error: why.
        draining: whether the replica held other versions too, which will go once no request uses them.
    """

    operation: Operation
    error: BaseException
    draining: bool


@dataclass(slots=True)
class _Pause:
    failures: int = 0
    reason: str = ""
    until: float = 0.0


class Convergence:
    """Starts loads and unloads; what is under way is known only here, what should be is in the database."""

    def __init__(
        self,
        fleet: Fleet,
        operations: Background,
        moments: Moments,
        clock: Callable[[], float],
        default_timeout_s: float,
        leased: Callable[[str], Collection[str]] = lambda organ: (),
    ) -> None:
        """
        Args:
            fleet: the replicas.
            operations: where to run calls.
            moments: since when rollouts are in their states, by the clock.
            clock: monotonic, in seconds.
            default_timeout_s: how long a load may take.
            leased: organ → the bundles that replays hold; they are not unloaded here, nor loaded.
        """
        self._fleet = fleet
        self._operations = operations
        self._moments = moments
        self._clock = clock
        self._default_timeout_s = default_timeout_s
        self._leased = leased
        self._draining: dict[Operation, bool] = {}
        self._pauses: dict[tuple[str, str], _Pause] = {}
        self._candidate_pauses: dict[str, float] = {}
        # (organ, digest) of the versions before that had to make room for a candidate.
        self._given_up: set[tuple[str, str]] = set()
        # Organ → the version before that stays in memory, as of the last step.
        self._kept_before: dict[str, str] = {}
        # (organ, digest) of those that stay in memory and that no request uses.
        self.spare: frozenset[tuple[str, str]] = frozenset()
        # Replicas that hold whatever requests under way still need of earlier versions.
        self._caught_up: set[str] = set()

    def unloading(self) -> set[tuple[str, str]]:
        """(replica, digest) of the unloads under way."""
        return {(key.replica, key.digest) for key in self._running() if key.kind == "unload"}

    def load_failures(self) -> dict[tuple[str, str], str]:
        """(replica, digest) → why its last load failed, until one succeeds or the replica is gone."""
        return {place: pause.reason for place, pause in list(self._pauses.items()) if pause.reason}

    def pause_candidate(self, rollout: Rollout, seconds: float) -> None:
        """Starts no load of a candidate for a time: the replica that it may have taken down should come back first."""
        self._candidate_pauses[rollout.id] = self._clock() + seconds

    def finished(self, operation: Operation, error: BaseException | None) -> LoadFailure | None:
        """Records a load or unload that ended.

        Returns:
            What the controller must judge, if it was a load that failed.
        """
        draining = self._draining.pop(operation, False)
        place = (operation.replica, operation.digest)
        if error is None:
            self._pauses.pop(place, None)
            return None
        if isinstance(error, ExpertCapacityError) and operation.organ in self._kept_before:
            # What is only there to go back to makes room.
            self._given_up.add((operation.organ, self._kept_before[operation.organ]))
        pause = self._pauses.setdefault(place, _Pause())
        pause.failures += 1
        pause.reason = format_error(error) if operation.kind == "load" else ""
        pause.until = self._clock() + min(2.0 ** (pause.failures - 1), LONGEST_PAUSE_S)
        logger.warning(
            "%s of %s… on replica %s of %s failed: %s",
            operation.kind,
            operation.digest[:12],
            operation.replica,
            operation.organ,
            format_error(error),
        )
        return LoadFailure(operation, error, draining) if operation.kind == "load" else None

    def step(self, snapshot: Snapshot, views: Mapping[str, OrganView]) -> None:
        """Starts what must be done now and is not under way."""
        self._forget_gone(snapshot, views)
        self._choose_kept(snapshot)
        extra = {
            (organ, view.replica): sorted(
                set(view.residents.bytes_by_digest) - self._needed(snapshot, organ) - set(self._leased(organ))
            )
            for organ, organ_view in views.items()
            for view in organ_view.replicas
            if view.residents is not None
        }
        if any(extra.values()):
            self._unload(extra)
        for organ, organ_view in views.items():
            live, candidate = snapshot.live(organ), snapshot.candidate(organ)
            if live is not None:
                for view in organ_view.replicas:
                    if view.residents is not None and not view.holds(live.stable_digest):
                        self._load(
                            organ, view, live.stable_digest, self._default_timeout_s, bool(extra[organ, view.replica])
                        )
            if candidate is not None and candidate.state in RESIDENT:
                self._load_candidate(organ_view, live.stable_digest if live else None, candidate, extra)
            elif live is not None and candidate is None and organ_view.held_everywhere(live.stable_digest):
                self._load_kept(organ_view)
        self._catch_up(snapshot, views)

    def _catch_up(self, snapshot: Snapshot, views: Mapping[str, OrganView]) -> None:
        """A replica that took a lost one's place gets the earlier versions, too, that requests are pinned to."""
        new = [
            (live, view)
            for live in snapshot.organs
            for view in views[live.organ].replicas
            if view.replica not in self._caught_up and view.holds(live.stable_digest)
        ]
        if not any(snapshot.earlier(live.organ) for live, _ in new):
            self._caught_up |= {view.replica for _, view in new}
            return
        try:
            pinned = frozenset(self._fleet.pinned())
        except Exception as error:
            logger.debug("the bundles in use are not known yet: %s", format_error(error))
            return
        for live, view in new:
            needed = self._needed(snapshot, live.organ)
            missing = [
                digest for digest in sorted((snapshot.earlier(live.organ) - needed) & pinned) if not view.holds(digest)
            ]
            for digest in missing:
                self._load(live.organ, view, digest, self._default_timeout_s, draining=True)
            if not missing:
                self._caught_up.add(view.replica)

    def _load_candidate(
        self,
        view: OrganView,
        stable: str | None,
        candidate: Rollout,
        extra: Mapping[tuple[str, str], Collection[str]],
    ) -> None:
        # The incumbent first, on every replica: a candidate that takes a replica down must find the others serving.
        if stable is not None and not view.held_everywhere(stable):
            return
        if self._clock() < self._candidate_pauses.get(candidate.id, 0.0):
            return
        running = {key.replica for key in self._running() if key.kind == "load" and key.digest == candidate.digest}
        unloading = {replica for replica, _ in self.unloading()}
        proven = any(replica.holds(candidate.digest) for replica in view.replicas)
        for replica in view.replicas:
            # One replica tries a new candidate before all the others do.
            if running and not proven:
                return
            if replica.residents is None or replica.holds(candidate.digest) or replica.replica in unloading:
                continue
            # What replays hold goes, too: a candidate waits for it, and does not fail of it.
            passing = {self._kept_before.get(view.organ, ""), *self._leased(view.organ)}
            draining = bool(extra[view.organ, replica.replica]) or any(map(replica.holds, passing))
            if self._load(view.organ, replica, candidate.digest, self._time_left(candidate), draining):
                running.add(replica.replica)

    def _load_kept(self, view: OrganView) -> None:
        """A replica that took a lost one's place gets the version to go back to, too, if it can hold it."""
        digest = self._kept_before.get(view.organ, "")
        for replica in view.replicas:
            known = replica.residents is not None and not replica.holds(digest)
            # Tried once: it is not needed now.
            if digest and known and (replica.replica, digest) not in self._pauses:
                self._load(view.organ, replica, digest, self._default_timeout_s, draining=False)

    def _choose_kept(self, snapshot: Snapshot) -> None:
        kept = {live.organ: snapshot.kept(live.organ) for live in snapshot.organs}
        self._given_up &= set(kept.items())
        self._kept_before = {
            organ: digest for organ, digest in kept.items() if digest and (organ, digest) not in self._given_up
        }
        found = frozenset(self._kept_before.items())
        if found <= self.spare:
            self.spare = found
            return
        try:
            # Once no request uses such a version, none ever will.
            pinned = frozenset(self._fleet.pinned())
        except Exception as error:
            logger.debug("the bundles in use are not known yet: %s", format_error(error))
            self.spare &= found
        else:
            self.spare = frozenset(item for item in found if item in self.spare or item[1] not in pinned)

    def _needed(self, snapshot: Snapshot, organ: str) -> set[str]:
        """What stays on an organ's replicas in any case, a candidate included that is resident from before."""
        live, candidate = snapshot.live(organ), snapshot.candidate(organ)
        needed = {live.stable_digest if live else "", candidate.digest if candidate else ""}
        return (needed | {self._kept_before.get(organ, "")}) - {""}

    def _time_left(self, candidate: Rollout) -> float:
        whole = candidate.plan.warm_timeout_s or self._default_timeout_s
        passed = self._moments.in_state_s(candidate) if candidate.state == State.VERIFIED else 0.0
        return max(whole - passed, 0.1)

    def _load(self, organ: str, view: ReplicaView, digest: str, timeout_s: float, draining: bool) -> bool:
        place = (view.replica, digest)
        pause = self._pauses.get(place)
        if (pause is not None and self._clock() < pause.until) or place in self.unloading():
            return False
        operation = Operation("load", organ, view.replica, digest)
        call = partial(self._fleet.load, view.replica, organ, digest, timeout_s)
        if self._operations.start(operation, call) is None:
            return False
        self._draining[operation] = draining
        return True

    def _unload(self, extra: Mapping[tuple[str, str], Collection[str]]) -> None:
        try:
            pinned = frozenset(self._fleet.pinned())
        except Exception as error:
            logger.warning("nothing is unloaded now: the bundles in use are not known: %s", format_error(error))
            return
        for (organ, replica), digests in extra.items():
            for digest in digests:
                pause = self._pauses.get((replica, digest))
                if digest not in pinned and (pause is None or self._clock() >= pause.until):
                    call = partial(self._fleet.unload, replica, organ, digest)
                    self._operations.start(Operation("unload", organ, replica, digest), call)

    def _running(self) -> list[Operation]:
        return [key for key in self._operations.running() if isinstance(key, Operation)]

    def _forget_gone(self, snapshot: Snapshot, views: Mapping[str, OrganView]) -> None:
        replicas = {view.replica for organ_view in views.values() for view in organ_view.replicas}
        self._pauses = {place: pause for place, pause in self._pauses.items() if place[0] in replicas}
        self._caught_up &= replicas
        in_flight = {rollout.id for rollout in snapshot.in_flight}
        self._candidate_pauses = {key: until for key, until in self._candidate_pauses.items() if key in in_flight}
