"""Reconciles the bundles on every replica: loads the stable version and the candidate, unloads unused ones."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from experts.errors import ExpertCapacityError
from router.rollouts.background import Background
from router.rollouts.fleet import Fleet
from router.rollouts.fleet_view import OrganView, ReplicaView
from router.rollouts.outcome import format_error
from router.rollouts.records import Rollout, Snapshot
from router.rollouts.state_timers import StateTimers
from router.rollouts.states import RESIDENT, State

LONGEST_PAUSE_S = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Operation:
    """A load or an unload; also its key among the running calls."""

    kind: Literal["load", "unload"]
    organ: str
    replica: str
    digest: str


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """A load that failed.

    Attributes:
        operation: the load.
        error: the exception.
        draining: whether the replica held other versions that will be unloaded once no request uses them.
    """

    operation: Operation
    error: BaseException
    draining: bool


@dataclass(slots=True)
class _Pause:
    failures: int = 0
    reason: str = ""
    until: float = 0.0


class ReplicaReconciler:
    """Starts loads and unloads. Knows the running ones; the desired state is in the database."""

    def __init__(
        self,
        fleet: Fleet,
        operations: Background,
        timers: StateTimers,
        clock: Callable[[], float],
        default_timeout_s: float,
        leased: Callable[[str], Collection[str]] = lambda organ: (),
    ) -> None:
        """
        Args:
            fleet: the replicas.
            operations: runs the calls.
            timers: how long rollouts have been in their states.
            clock: monotonic, in seconds.
            default_timeout_s: how long a load may take.
            leased: organ → bundles leased by replays; they are neither loaded nor unloaded here.
        """
        self._fleet = fleet
        self._operations = operations
        self._timers = timers
        self._clock = clock
        self._default_timeout_s = default_timeout_s
        self._leased = leased
        self._draining: dict[Operation, bool] = {}
        self._pauses: dict[tuple[str, str], _Pause] = {}
        self._candidate_pauses: dict[str, float] = {}
        # (organ, digest) of rollback targets that were evicted for a candidate.
        self._evicted: set[tuple[str, str]] = set()
        # Organ → the rollback target that stays in memory, as of the last step.
        self._rollback_targets: dict[str, str] = {}
        # (organ, digest) of the rollback targets that no request uses.
        self.spare: frozenset[tuple[str, str]] = frozenset()
        # Replicas that hold all earlier versions that running requests are pinned to.
        self._caught_up: set[str] = set()

    def unloading(self) -> set[tuple[str, str]]:
        """(replica, digest) of the running unloads."""
        return {(key.replica, key.digest) for key in self._running() if key.kind == "unload"}

    def load_failures(self) -> dict[tuple[str, str], str]:
        """(replica, digest) → why its last load failed; removed when a load succeeds or the replica is gone."""
        return {place: pause.reason for place, pause in list(self._pauses.items()) if pause.reason}

    def pause_candidate(self, rollout: Rollout, seconds: float) -> None:
        """Delays loads of a candidate, so that a replica that it may have crashed is replaced first."""
        self._candidate_pauses[rollout.id] = self._clock() + seconds

    def finished(self, operation: Operation, error: BaseException | None) -> LoadFailure | None:
        """Records a load or unload that ended.

        Returns:
            The failure for the controller to judge, if it was a load.
        """
        draining = self._draining.pop(operation, False)
        place = (operation.replica, operation.digest)
        if error is None:
            self._pauses.pop(place, None)
            return None
        if isinstance(error, ExpertCapacityError) and operation.organ in self._rollback_targets:
            # A rollback target is evicted when memory is short.
            self._evicted.add((operation.organ, self._rollback_targets[operation.organ]))
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
        """Starts the loads and unloads that are needed now and not running."""
        self._drop_stale(snapshot, views)
        self._choose_rollback_targets(snapshot)
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
            elif live is not None and candidate is None and organ_view.resident_everywhere(live.stable_digest):
                self._load_rollback_target(organ_view)
        self._catch_up(snapshot, views)

    def _catch_up(self, snapshot: Snapshot, views: Mapping[str, OrganView]) -> None:
        """Loads earlier versions that requests are pinned to on replicas that replaced lost ones."""
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
            logger.debug("the bundles in use are unknown: %s", format_error(error))
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
        # The incumbent first, on every replica: if a candidate crashes a replica, the others must be serving.
        if stable is not None and not view.resident_everywhere(stable):
            return
        if self._clock() < self._candidate_pauses.get(candidate.id, 0.0):
            return
        running = {key.replica for key in self._running() if key.kind == "load" and key.digest == candidate.digest}
        unloading = {replica for replica, _ in self.unloading()}
        proven = any(replica.holds(candidate.digest) for replica in view.replicas)
        for replica in view.replicas:
            # One replica loads a new candidate before all others do.
            if running and not proven:
                return
            if replica.residents is None or replica.holds(candidate.digest) or replica.replica in unloading:
                continue
            # Leased bundles are released, too; the candidate waits for that instead of failing.
            transient = {self._rollback_targets.get(view.organ, ""), *self._leased(view.organ)}
            draining = bool(extra[view.organ, replica.replica]) or any(map(replica.holds, transient))
            if self._load(view.organ, replica, candidate.digest, self._time_left(candidate), draining):
                running.add(replica.replica)

    def _load_rollback_target(self, view: OrganView) -> None:
        """Loads the rollback target on replicas that replaced lost ones, if their memory allows it."""
        digest = self._rollback_targets.get(view.organ, "")
        for replica in view.replicas:
            known = replica.residents is not None and not replica.holds(digest)
            # Tried once, because it is not needed now.
            if digest and known and (replica.replica, digest) not in self._pauses:
                self._load(view.organ, replica, digest, self._default_timeout_s, draining=False)

    def _choose_rollback_targets(self, snapshot: Snapshot) -> None:
        targets = {live.organ: snapshot.rollback_target(live.organ) for live in snapshot.organs}
        self._evicted &= set(targets.items())
        self._rollback_targets = {
            organ: digest for organ, digest in targets.items() if digest and (organ, digest) not in self._evicted
        }
        found = frozenset(self._rollback_targets.items())
        if found <= self.spare:
            self.spare = found
            return
        try:
            # A version that no request uses now will never be used by one.
            pinned = frozenset(self._fleet.pinned())
        except Exception as error:
            logger.debug("the bundles in use are unknown: %s", format_error(error))
            self.spare &= found
        else:
            self.spare = frozenset(item for item in found if item in self.spare or item[1] not in pinned)

    def _needed(self, snapshot: Snapshot, organ: str) -> set[str]:
        """The bundles that stay on an organ's replicas, including a candidate that is loaded already."""
        live, candidate = snapshot.live(organ), snapshot.candidate(organ)
        needed = {live.stable_digest if live else "", candidate.digest if candidate else ""}
        return (needed | {self._rollback_targets.get(organ, "")}) - {""}

    def _time_left(self, candidate: Rollout) -> float:
        whole = candidate.plan.warm_timeout_s or self._default_timeout_s
        passed = self._timers.in_state_s(candidate) if candidate.state == State.VERIFIED else 0.0
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
            logger.warning("nothing is unloaded now, because the bundles in use are unknown: %s", format_error(error))
            return
        for (organ, replica), digests in extra.items():
            for digest in digests:
                pause = self._pauses.get((replica, digest))
                if digest not in pinned and (pause is None or self._clock() >= pause.until):
                    call = partial(self._fleet.unload, replica, organ, digest)
                    self._operations.start(Operation("unload", organ, replica, digest), call)

    def _running(self) -> list[Operation]:
        return [key for key in self._operations.running() if isinstance(key, Operation)]

    def _drop_stale(self, snapshot: Snapshot, views: Mapping[str, OrganView]) -> None:
        replicas = {view.replica for organ_view in views.values() for view in organ_view.replicas}
        self._pauses = {place: pause for place, pause in self._pauses.items() if place[0] in replicas}
        self._caught_up &= replicas
        in_flight = {rollout.id for rollout in snapshot.in_flight}
        self._candidate_pauses = {key: until for key, until in self._candidate_pauses.items() if key in in_flight}
