"""The controller: a reconcile loop that brings rollouts and replicas to the state in the database.

It is level-triggered: each pass compares the desired with the observed state and starts what is missing. It stores no
state of its own that matters, so a new process can continue from the database after a crash.
"""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from experts.errors import ExpertCapacityError
from router.rollouts.background import Background
from router.rollouts.fleet import Fleet, ReplicaLostError, Verifier
from router.rollouts.fleet_view import FleetObserver, OrganView
from router.rollouts.gate_runs import EVALUABLE, GateRuns
from router.rollouts.gates import Evaluator
from router.rollouts.health import HealthMonitor
from router.rollouts.judge import judge, unjudged_latency
from router.rollouts.leases import Leases
from router.rollouts.outcome import format_error, listed
from router.rollouts.promotion_watch import PromotionWatch, other_versions, watch_s
from router.rollouts.records import Rollout, Snapshot
from router.rollouts.replica_reconciler import LoadFailure, Operation, ReplicaReconciler
from router.rollouts.settings import RolloutSettings, Thresholds
from router.rollouts.state_timers import StateTimers
from router.rollouts.states import RESIDENT, Action, State
from router.rollouts.step_conditions import current_step, format_waits, step_waits_for
from router.rollouts.store import RolloutStore
from router.rollouts.transaction import CONTROLLER as ACTOR
from router.rollouts.transaction import Transaction

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Verification:
    """The key of a verification among the running calls."""

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
        leases: Leases | None = None,
        evaluator: Evaluator | None = None,
    ) -> None:
        """Starts nothing; see `start`.

        Without `leases` there are no replays; without an evaluator no gate is passed.
        """
        self._store = store
        self._fleet = fleet
        self._verifier = verifier
        self._settings = settings
        self._monitor = monitor
        # Durations come from the monitor's monotonic clock, times of day from the store's wall clock.
        self._clock = monitor.clock
        self._timers = StateTimers(self._clock)
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._calls = Background(settings.max_operations, self.wake)
        self._observer = FleetObserver(fleet, settings.status_timeout_s)
        leased = (leases or Leases()).digests
        self._reconciler = ReplicaReconciler(
            fleet, self._calls, self._timers, self._clock, settings.warm_timeout_s, leased
        )
        self._promoted = PromotionWatch(store, monitor, self._timers, settings)
        self.gates = GateRuns(store, evaluator, self._clock, self._fail, self.wake)
        self._waits: Mapping[str, str] = {}
        self._verifying_since: dict[str, float] = {}
        self._views: Mapping[str, OrganView] = {}

    @property
    def views(self) -> Mapping[str, OrganView]:
        """What the replicas of each organ held and loaded at the last pass."""
        return self._views

    def waits_for(self, rollout_id: str) -> str:
        """What a rollout waited for at the last pass, as text; "" if it does not advance automatically."""
        return self._waits.get(rollout_id, "")

    def is_spare(self, organ: str, digest: str) -> bool:
        """Whether a version was in memory only for a rollback at the last pass: no request uses it."""
        return (organ, digest) in self._reconciler.spare

    def unloading(self) -> set[tuple[str, str]]:
        """(replica, digest) of the running unloads. May be called from any thread."""
        return self._reconciler.unloading()

    def load_failures(self) -> Mapping[tuple[str, str], str]:
        """(replica, digest) → why the last load failed; removed when a load succeeds."""
        return self._reconciler.load_failures()

    def start(self) -> None:
        """Starts a thread that reconciles after every change and every `period_s`."""
        assert self._thread is None
        unsubscribe = self._store.subscribe(self.wake)
        self._thread = threading.Thread(target=self._run, args=(unsubscribe,), name="rollouts", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the current pass. Loads and verifications that it started continue; the next start
        finds them. An evaluation is cancelled, and the next start begins it again.
        """
        self._stopping.set()
        self.gates.stop()
        self.wake()
        if self._thread is not None:
            self._thread.join()

    def wake(self) -> None:
        """Starts a pass now, for example after an observation that may fail a candidate."""
        self._wake.set()

    def reconcile_once(self, *, recent_s: float = 0.0) -> Mapping[str, OrganView]:
        """Runs one pass. It blocks only for the replicas' status.

        Args:
            recent_s: how old the status of organs without changes may be.

        Returns:
            What the replicas hold, by organ.

        Raises:
            Exception: the database cannot be used; the next pass tries again.
        """
        began = self._clock()
        self._take_finished()
        snapshot = self._store.snapshot()
        self._timers.note((*snapshot.in_flight, *snapshot.watched), began)
        views = self._observer.observe(snapshot, snapshot.known_organs, self._reconciler.unloading(), recent_s=recent_s)
        self.gates.step(snapshot, views)
        for rollout in snapshot.in_flight:
            self._advance(rollout, snapshot, views[rollout.organ])
        self._promoted.step(snapshot)
        snapshot = self._store.snapshot()
        self._timers.note((*snapshot.in_flight, *snapshot.watched), began)
        self._views = views
        self._waits = {
            rollout.id: self._waits_of(rollout, views.get(rollout.organ))
            for rollout in (*snapshot.in_flight, *snapshot.watched)
        }
        self._reconciler.step(snapshot, views)
        return views

    def _run(self, unsubscribe: Any) -> None:
        logged = ""
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                # A rollout wakes this many times a second; polling the other organs as often would slow their requests.
                self.reconcile_once(recent_s=self._settings.period_s)
            except Exception as error:
                # A failure is logged once, not on every pass.
                if (failure := repr(error)) != logged:
                    logger.exception("a pass over the rollouts failed; the next one tries again")
                logged = failure
                self._stopping.wait(self._settings.period_s)
            else:
                if logged:
                    logger.info("passes over the rollouts succeed again")
                logged = ""
            self._wake.wait(self._settings.period_s)
        unsubscribe()

    def _take_finished(self) -> None:
        for key, future in self._calls.take_done().items():
            error = future.exception()
            if isinstance(key, _Verification):
                self._verification_ended(key.rollout_id, error)
            elif isinstance(key, Operation) and (failure := self._reconciler.finished(key, error)):
                self._load_failed(failure)

    def _advance(self, rollout: Rollout, snapshot: Snapshot, view: OrganView) -> None:
        if rollout.state == State.STAGED:
            if rollout.restores and view.resident_everywhere(rollout.digest):
                # It was verified before it was loaded, and is still resident.
                self._move(rollout, Action.VERIFY, _lasting(rollout))
            else:
                self._verify(rollout)
        elif rollout.state == State.VERIFIED:
            self._await_warm(rollout, view)
        elif reason := self._unhealthy(rollout, snapshot):
            self._move(rollout, Action.ROLL_BACK, reason)
        elif rollout.automatic and view.resident_everywhere(rollout.digest):
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
        if not self._calls.has_capacity():
            return
        # Counted before it begins, so that a bundle that kills this process is not verified again and again.
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
            self._fail(rollout_id, f"verification failed: {format_error(error)}")
            return
        with self._store.write() as transaction:
            rollout = transaction.rollout(rollout_id)
            if rollout.state == State.STAGED:
                transaction.move(rollout, Action.VERIFY, actor=ACTOR, reason=_lasting(rollout))

    def _await_warm(self, rollout: Rollout, view: OrganView) -> None:
        if view.resident_everywhere(rollout.digest):
            self._move(rollout, Action.WARM_UP, _lasting(rollout))
            return
        limit = rollout.plan.warm_timeout_s or self._settings.warm_timeout_s
        if self._timers.in_state_s(rollout) <= limit:
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
            # The incumbent takes precedence when memory is short.
            self._fail(
                candidate.id,
                f"replica {operation.replica} has no room for the stable version beside it: {format_error(error)}",
            )

    def _candidate_load_failed(self, candidate: Rollout, failure: LoadFailure) -> None:
        operation, error = failure.operation, failure.error
        where = f"loading on replica {operation.replica} failed"
        if isinstance(error, ReplicaLostError):
            losses = candidate.replica_losses + 1
            if losses > self._settings.max_replica_losses:
                self._fail(
                    candidate.id, f"{where}, and {losses} replicas were lost in loading it: {format_error(error)}"
                )
                return
            with self._store.write() as transaction:
                current = transaction.rollout(candidate.id)
                if current.in_flight:
                    transaction.count_replica_loss(current)
            self._reconciler.pause_candidate(candidate, self._settings.loss_pause_s)
        elif not (failure.draining and isinstance(error, ExpertCapacityError)):
            # Older versions are being unloaded, so there may be memory soon. `warm_timeout_s` bounds the wait.
            self._fail(candidate.id, f"{where}: {format_error(error)}")

    def _unhealthy(self, rollout: Rollout, snapshot: Snapshot) -> str:
        if rollout.mode is None or rollout.traffic_since is None:
            return ""
        since = self._timers.traffic_since(rollout)
        elsewhere = other_versions(snapshot, rollout.organ)
        return judge(
            self._monitor,
            rollout,
            self._thresholds(rollout),
            since,
            rollout.incumbent_digest,
            elsewhere,
            self._timers.state_since(rollout),
        )

    def _thresholds(self, rollout: Rollout) -> Thresholds:
        return rollout.plan.thresholds or self._settings.thresholds

    def _step_waits(self, rollout: Rollout) -> list[str]:
        step = current_step(rollout.plan, rollout.next_step)
        if step is None:
            return []
        since = self._timers.state_since(rollout)
        successes = self._monitor.observed(rollout.organ, rollout.digest, since).successes
        return step_waits_for(step, self._thresholds(rollout), self._timers.in_state_s(rollout), successes)

    def _waits_of(self, rollout: Rollout, view: OrganView | None) -> str:
        if rollout.state == State.STABLE:
            return f"the end of its watch, {watch_s(rollout):g} s after its promotion"
        if rollout.state in EVALUABLE and (gates := self.gates.waits_for(rollout)):
            return gates
        if not rollout.automatic or rollout.mode is None:
            return ""
        waits = self._step_waits(rollout)
        if view is not None and not view.resident_everywhere(rollout.digest):
            missing = listed(view.missing(rollout.digest)) or rollout.organ
            waits.append(f"replicas that do not hold it: {missing}")
        return format_waits(waits)

    def _take_step(self, rollout: Rollout) -> None:
        if self._step_waits(rollout) or not self.gates.standing(rollout).passed:
            return
        steps = rollout.plan.steps
        if rollout.next_step < len(steps):
            step = steps[rollout.next_step]
            action = Action.CANARY if step.mode == "canary" else Action.SHADOW
            reason = f"step {rollout.next_step + 1} of {len(steps)}"
            self._move(rollout, action, reason, percent=step.percent, next_step=rollout.next_step + 1)
        elif rollout.plan.promote:
            with self._store.write() as transaction:
                if current := _unmoved(transaction, rollout):
                    reason = _lasting(rollout) or f"all steps are done{self._unjudged(rollout)}"
                    transaction.promote(current, actor=ACTOR, reason=reason, max_previous=self._settings.max_previous)

    def _unjudged(self, rollout: Rollout) -> str:
        since = self._timers.traffic_since(rollout)
        found = unjudged_latency(self._monitor, rollout, self._thresholds(rollout), since) if rollout.plan.steps else ""
        return f"; {found}" if found else ""

    def _move(self, rollout: Rollout, action: Action, reason: str = "", **changes: Any) -> None:
        """Moves a rollout, unless it was moved since it was read."""
        with self._store.write() as transaction:
            if current := _unmoved(transaction, rollout):
                transaction.move(current, action, actor=ACTOR, reason=reason, **changes)

    def _fail(self, rollout_id: str, reason: str) -> None:
        """Fails a rollout in any state in flight."""
        with self._store.write() as transaction:
            rollout = transaction.rollout(rollout_id)
            if rollout.in_flight:
                transaction.move(rollout, Action.FAIL, actor=ACTOR, reason=reason)


def _unmoved(transaction: Transaction, rollout: Rollout) -> Rollout | None:
    current = transaction.rollout(rollout.id)
    same = (current.state, current.state_since, current.percent, current.next_step, current.plan) == (
        rollout.state,
        rollout.state_since,
        rollout.percent,
        rollout.next_step,
        rollout.plan,
    )
    return current if same else None


def _lasting(rollout: Rollout) -> str:
    """The reason that a rollout which restores an earlier version keeps until it is stable."""
    return (rollout.reason or "the version before is back") if rollout.restores else ""
