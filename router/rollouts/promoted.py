"""Watches versions for a time after their promotion, and rolls back those that fail."""

from router.rollouts.health import HealthMonitor
from router.rollouts.judge import judge
from router.rollouts.moments import Moments
from router.rollouts.records import Rollout, Snapshot
from router.rollouts.settings import RolloutPlan, RolloutSettings
from router.rollouts.states import Action, State
from router.rollouts.store import RolloutStore
from router.rollouts.transaction import CONTROLLER


class PromotionWatch:
    """One step for every pass of the controller."""

    def __init__(
        self, store: RolloutStore, monitor: HealthMonitor, moments: Moments, settings: RolloutSettings
    ) -> None:
        """Takes where the state is, what was observed, since when, and the default thresholds."""
        self._store = store
        self._monitor = monitor
        self._moments = moments
        self._settings = settings

    def step(self, snapshot: Snapshot) -> None:
        """Ends the watches that are over, and goes back where a version fails."""
        for rollout in snapshot.watched:
            if reason := self._unhealthy(rollout, snapshot):
                self._go_back(rollout, reason)
            elif self._moments.in_state_s(rollout) >= watch_s(rollout):
                self._end(rollout)

    def _unhealthy(self, rollout: Rollout, snapshot: Snapshot) -> str:
        thresholds = rollout.plan.thresholds or self._settings.thresholds
        since = self._moments.state_since(rollout)
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
                # An operator was faster.
                return
            previous = snapshot.kept(rollout.organ)
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
    """(organ, digest) of the versions that serve all other organs."""
    return [(live.organ, live.stable_digest) for live in snapshot.organs if live.organ != organ]
