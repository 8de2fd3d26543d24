"""The checks before a rollout begins, and the settings that are fixed at its start."""

from router.errors import RolloutStateError
from router.rollouts.last_event import format_last_event
from router.rollouts.operation_checks import already_applied
from router.rollouts.outcome import Outcome
from router.rollouts.precondition import Names
from router.rollouts.settings import RolloutPlan, RolloutSettings
from router.rollouts.transaction import Transaction


def version_to_stage(
    transaction: Transaction, organ: str, digest: str, plan: RolloutPlan, file_digest: str | None, names: Names
) -> Outcome | None:
    """Checks that a rollout of a version can begin.

    Args:
        transaction: the state.
        organ: the organ; one that is not in the live set is new.
        digest: the version.
        plan: its automatic steps.
        file_digest: the identity of the rollout file, if there is one.
        names: digest → the version's name in messages.

    Returns:
        the outcome where the version is in flight or stable already, or the file was applied before; otherwise None.

    Raises:
        RolloutStateError: another rollout of the organ is in flight, the version was retired, or a new organ has a
            shadow step.
    """
    snapshot = transaction.snapshot()
    if file_digest is not None and (applied := transaction.applied(file_digest)):
        return Outcome(organ, False, (already_applied(applied),), applied)
    live, candidate = snapshot.live(organ), snapshot.candidate(organ)
    if candidate is not None:
        # A rollout that was not begun by this file does not have the file's steps.
        if candidate.digest == digest and file_digest is None and not candidate.restores:
            words = f"it is in flight already, {candidate.state}: {format_last_event(transaction, candidate, names)}"
            return Outcome(organ, False, (words,), candidate)
        raise RolloutStateError(
            f"{candidate.subject} is {candidate.state}, so no other can begin; promote it or roll it back first"
        )
    if live is not None and live.stable_digest == digest:
        return Outcome(organ, False, (f"{digest[:12]}… is the stable version of {organ} already",))
    if (organ, digest) in snapshot.retired:
        raise RolloutStateError(f"the version {digest[:12]}… of {organ!r} was retired; stage another one")
    if live is None and any(step.mode == "shadow" for step in plan.steps):
        raise RolloutStateError(
            f"{organ!r} is new and has no version that a shadow could be compared with; use canary steps"
        )
    return None


def resolved(plan: RolloutPlan, settings: RolloutSettings) -> RolloutPlan:
    """The plan with the current settings filled in, so that later changes of them do not affect a rollout in flight."""
    return plan.model_copy(
        update={
            "thresholds": plan.thresholds or settings.thresholds,
            "warm_timeout_s": plan.warm_timeout_s or settings.warm_timeout_s,
            "watch_after_promotion_s": (
                settings.watch_after_promotion_s
                if plan.watch_after_promotion_s is None
                else plan.watch_after_promotion_s
            ),
        }
    )
