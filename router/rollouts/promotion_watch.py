"""Judges versions for a time after their promotion, and rolls back those that fail."""

from router.rollouts.health import HealthMonitor
from router.rollouts.judge import judge
from router.rollouts.records import Rollout, Snapshot
from router.rollouts.settings import RolloutPlan, RolloutSettings
from router.rollouts.state_timers import StateTimers
from router.rollouts.states import Action, State
from router.rollouts.store import RolloutStore
from router.rollouts.transaction import CONTROLLER


class PromotionWatch:
    """The controller calls `step` in every pass."""

    def __init__(
        self, store: RolloutStore, monitor: HealthMonitor, timers: StateTimers, settings: RolloutSettings
    ) -> None:
        """`settings` has the default thresholds."""
        self._store = store
        self._monitor = monitor
        self._timers = timers
        self._settings = settings

    def step(self, snapshot: Snapshot) -> None:
        """Ends the watches that are over, and rolls back versions that fail."""
        for rollout in snapshot.watched:
            if reason := self._unhealthy(rollout, snapshot):
                self._go_back(rollout, reason)
            elif self._timers.in_state_s(rollout) >= watch_s(rollout):
                self._end(rollout)

    def _unhealthy(self, rollout: Rollout, snapshot: Snapshot) -> str:
        thresholds = rollout.plan.thresholds or self._settings.thresholds
        since = self._timers.state_since(rollout)
        elsewhere = other_versions(snapshot, rollout.organ)
        return judge(self._monitor, rollout, thresholds, since, rollout.incumbent_digest, elsewhere)

    def _end(self, rollout: Rollout) -> None:
        with self._store.write() as transaction:
            current = transaction.rollout(rollout.id)
            if current.state == State.STABLE:
                transaction.end_watch(current)

    def _go_back(self, rollout: Rollout, reason: str) -> None:
        with self._store.write() as transaction:
            current = transaction.rollout(rollout.id)
            if current.state != State.STABLE or not current.watching:
                return
            snapshot = transaction.snapshot()
            candidate = snapshot.candidate(rollout.organ)
            if candidate is not None and candidate.restores:
                # An operator changed it first.
                return
            previous = snapshot.rollback_target(rollout.organ)
            if previous is None:
                transaction.note_failing(current, reason)
                return
            transaction.end_watch(current)
            if candidate is not None:
                because = f"{rollout.id}, which it was to replace, fails, and the version before that comes back"
                transaction.move(candidate, Action.ROLL_BACK, actor=CONTROLLER, reason=because)
            plan = RolloutPlan(
                promote=True,
                thresholds=rollout.plan.thresholds,
                warm_timeout_s=rollout.plan.warm_timeout_s,
                watch_after_promotion_s=0,
            )
            because = f"{rollout.id} fails after its promotion: {reason}"
            transaction.stage(rollout.organ, previous, plan, actor=CONTROLLER, reason=because, restores=True)


def watch_s(rollout: Rollout) -> float:
    """Seconds for which a rollout's version is judged after its promotion."""
    return rollout.plan.watch_after_promotion_s or 0.0


def other_versions(snapshot: Snapshot, organ: str) -> list[tuple[str, str]]:
    """(organ, digest) of all other organs' stable versions."""
    return [(live.organ, live.stable_digest) for live in snapshot.organs if live.organ != organ]
