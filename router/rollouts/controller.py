"""Drives every rollout from the database to the fleet and back, until both agree.

Level-triggered: each pass looks at what should be and at what is, and starts what is missing. Nothing that matters is
kept between passes, so a process killed at any point goes on where the database stands.
"""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from experts.errors import ExpertCapacityError
from router.rollouts.background import Background
from router.rollouts.convergence import Convergence, LoadFailure, Operation
from router.rollouts.fleet import Fleet, ReplicaLostError, Verifier
from router.rollouts.fleet_view import FleetObserver, OrganView
from router.rollouts.health import HealthMonitor, reason_to_roll_back
from router.rollouts.outcome import listed, words
from router.rollouts.records import Rollout, Snapshot
from router.rollouts.settings import RolloutSettings
from router.rollouts.states import RESIDENT, Action, State
from router.rollouts.store import RolloutStore
from router.rollouts.transaction import Transaction

ACTOR = "controller"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Verification:
    """The key of a verification among the calls under way."""

    rollout_id: str


class RolloutController:
    """One controller per database. `reconcile_once` is called by one thread at a time."""

    def __init__(
        self,
        store: RolloutStore,
        fleet: Fleet,
        verifier: Verifier,
        settings: RolloutSettings,
        monitor: HealthMonitor,
    ) -> None:
        """Takes all that it works with; starts nothing."""
        self._store = store
        self._fleet = fleet
        self._verifier = verifier
        self._settings = settings
        self._monitor = monitor
        self._clock = store.clock
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._calls = Background(settings.max_operations, self.wake)
        self._observer = FleetObserver(fleet, settings.status_timeout_s)
        self._convergence = Convergence(fleet, self._calls, self._clock, settings.warm_timeout_s)
        self._verifying_since: dict[str, float] = {}
        self._views: Mapping[str, OrganView] = {}

    @property
    def views(self) -> Mapping[str, OrganView]:
        """What the replicas held at the last pass, by organ, with the loads under way."""
        return self._views

    def load_failures(self) -> Mapping[tuple[str, str], str]:
        """(replica, digest) → why the last load of that bundle failed there, until one succeeds."""
        return self._convergence.load_failures()

    def start(self) -> None:
        """Reconciles on a thread, after every change and every `period_s`."""
        assert self._thread is None
        unsubscribe = self._store.subscribe(self.wake)
        self._thread = threading.Thread(target=self._run, args=(unsubscribe,), name="rollouts", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the pass under way; what it started goes on, and is found again by the next start."""
        self._stopping.set()
        self.wake()
        if self._thread is not None:
            self._thread.join()

    def wake(self) -> None:
        """Has a pass begin at once, for example after an observation that may end a candidate."""
        self._wake.set()

    def reconcile_once(self, *, recent_s: float = 0.0) -> Mapping[str, OrganView]:
        """One pass. Waits for replicas to say what they hold, and for nothing else.

        Args:
            recent_s: how old may be what is known of organs that nothing happens to.

        Returns:
            What the replicas held.

        Raises:
            Exception: the database cannot be used; the next pass tries again.
        """
        self._take_finished()
        snapshot = self._store.snapshot()
        views = self._observer.observe(
            snapshot, snapshot.known_organs, self._convergence.unloading(), recent_s=recent_s
        )
        for rollout in snapshot.in_flight:
            self._advance(rollout, snapshot, views[rollout.organ])
        snapshot = self._store.snapshot()
        self._views = views
        self._convergence.step(snapshot, views)
        return views

    def _run(self, unsubscribe: Any) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                # A rollout wakes this many times a second; the other organs' replicas have requests to answer.
                self.reconcile_once(recent_s=self._settings.period_s)
            except Exception:
                logger.exception("a pass over the rollouts failed; the next one tries again")
                self._stopping.wait(self._settings.period_s)
            self._wake.wait(self._settings.period_s)
        unsubscribe()

    def _take_finished(self) -> None:
        for key, future in self._calls.take_done().items():
            error = future.exception()
            if isinstance(key, _Verification):
                self._verification_ended(key.rollout_id, error)
            elif isinstance(key, Operation) and (failure := self._convergence.finished(key, error)):
                self._load_failed(failure)

    def _advance(self, rollout: Rollout, snapshot: Snapshot, view: OrganView) -> None:
        if rollout.state == State.STAGED:
            self._verify(rollout)
        elif rollout.state == State.VERIFIED:
            self._await_warm(rollout, view)
        elif reason := self._unhealthy(rollout):
            self._move(rollout, Action.ROLL_BACK, reason)
        elif rollout.automatic and view.held_everywhere(rollout.digest):
            self._take_step(rollout)

    def _verify(self, rollout: Rollout) -> None:
        key = _Verification(rollout.id)
        if key in self._calls.running():
            since = self._verifying_since.get(rollout.id, self._clock())
            if self._clock() - since > self._settings.verify_timeout_s:
                limit = self._settings.verify_timeout_s
                self._fail(rollout.id, f"verifying the bundle took longer than {limit:g} s (verify_timeout_s)")
            return
        if rollout.verify_attempts >= self._settings.max_verify_attempts:
            self._fail(rollout.id, f"the process that verified the bundle died of it {rollout.verify_attempts} times")
            return
        if not self._calls.has_room():
            return
        # Counted before it begins: a bundle that kills the process must not do so for ever.
        with self._store.write() as transaction:
            current = transaction.rollout(rollout.id)
            if current.state != State.STAGED:
                return
            transaction.count_verify_attempt(current)
        self._verifying_since = {**self._still_verifying(), rollout.id: self._clock()}
        self._calls.start(key, partial(self._verifier.verify, rollout.organ, rollout.digest))

    def _still_verifying(self) -> dict[str, float]:
        running = self._calls.running()
        return {key: since for key, since in self._verifying_since.items() if _Verification(key) in running}

    def _verification_ended(self, rollout_id: str, error: BaseException | None) -> None:
        if error is not None:
            self._fail(rollout_id, f"verification failed: {words(error)}")
            return
        with self._store.write() as transaction:
            rollout = transaction.rollout(rollout_id)
            if rollout.state == State.STAGED:
                transaction.move(rollout, Action.VERIFY, actor=ACTOR)

    def _await_warm(self, rollout: Rollout, view: OrganView) -> None:
        if view.held_everywhere(rollout.digest):
            self._move(rollout, Action.WARM_UP)
            return
        limit = rollout.plan.warm_timeout_s or self._settings.warm_timeout_s
        if self._clock() - rollout.state_since <= limit:
            return
        missing = view.missing(rollout.digest)
        where = (
            f"not on {listed(missing)} of {len(view.replicas)} replicas"
            if view.replicas
            else view.problem or f"no replica of {rollout.organ!r} is running"
        )
        self._fail(rollout.id, f"slow to warm: not loaded everywhere within {limit:g} s (warm_timeout_s): {where}")

    def _load_failed(self, failure: LoadFailure) -> None:
        operation, error = failure.operation, failure.error
        snapshot = self._store.snapshot()
        candidate = snapshot.candidate(operation.organ)
        live = snapshot.live(operation.organ)
        if candidate is None or candidate.state not in RESIDENT:
            return
        if candidate.digest == operation.digest:
            self._candidate_load_failed(candidate, failure)
        elif live is not None and live.stable_digest == operation.digest and isinstance(error, ExpertCapacityError):
            # The incumbent has the older right to the memory.
            self._fail(
                candidate.id,
                f"replica {operation.replica} has no room for the stable version beside it: {words(error)}",
            )

    def _candidate_load_failed(self, candidate: Rollout, failure: LoadFailure) -> None:
        operation, error = failure.operation, failure.error
        where = f"loading on replica {operation.replica} failed"
        if isinstance(error, ReplicaLostError):
            losses = candidate.replica_losses + 1
            if losses > self._settings.max_replica_losses:
                self._fail(candidate.id, f"{where}, and {losses} replicas were lost in loading it: {words(error)}")
                return
            with self._store.write() as transaction:
                current = transaction.rollout(candidate.id)
                if current.in_flight:
                    transaction.count_replica_loss(current)
            self._convergence.pause_candidate(candidate, self._settings.loss_pause_s)
        elif not (failure.draining and isinstance(error, ExpertCapacityError)):
            # With older versions on their way out there may be room soon; the time to warm is bounded anyway.
            self._fail(candidate.id, f"{where}: {words(error)}")

    def _unhealthy(self, rollout: Rollout) -> str:
        if rollout.mode is None or rollout.traffic_since is None:
            return ""
        thresholds = rollout.plan.thresholds or self._settings.thresholds
        since = max(self._clock() - thresholds.window_s, rollout.traffic_since)
        candidate = self._monitor.observed(rollout.organ, rollout.digest, since)
        incumbent = None
        if rollout.incumbent_digest is not None:
            incumbent = self._monitor.observed(rollout.organ, rollout.incumbent_digest, since)
        return reason_to_roll_back(thresholds, candidate, incumbent)

    def _take_step(self, rollout: Rollout) -> None:
        steps = rollout.plan.steps
        if rollout.next_step and self._clock() - rollout.state_since < steps[rollout.next_step - 1].hold_s:
            return
        if rollout.next_step < len(steps):
            step = steps[rollout.next_step]
            action = Action.CANARY if step.mode == "canary" else Action.SHADOW
            reason = f"step {rollout.next_step + 1} of {len(steps)}"
            self._move(rollout, action, reason, percent=step.percent, next_step=rollout.next_step + 1)
        elif rollout.plan.promote:
            with self._store.write() as transaction:
                if current := _unmoved(transaction, rollout):
                    reason = "the version before is back" if rollout.restores else "all steps are done"
                    transaction.promote(current, actor=ACTOR, reason=reason, max_previous=self._settings.max_previous)

    def _move(self, rollout: Rollout, action: Action, reason: str = "", **changes: Any) -> None:
        """Moves a rollout, unless somebody else did since it was looked at."""
        with self._store.write() as transaction:
            if current := _unmoved(transaction, rollout):
                transaction.move(current, action, actor=ACTOR, reason=reason, **changes)

    def _fail(self, rollout_id: str, reason: str) -> None:
        """Fails a rollout, wherever it stands in its flight."""
        with self._store.write() as transaction:
            rollout = transaction.rollout(rollout_id)
            if rollout.in_flight:
                transaction.move(rollout, Action.FAIL, actor=ACTOR, reason=reason)


def _unmoved(transaction: Transaction, rollout: Rollout) -> Rollout | None:
    current = transaction.rollout(rollout.id)
    same = (current.state, current.state_since) == (rollout.state, rollout.state_since)
    return current if same else None
