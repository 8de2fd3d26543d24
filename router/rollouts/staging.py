"""Beginning a rollout: what is refused, what was done before, and the settings that the rollout keeps."""

from router.errors import RolloutStateError
from router.rollouts.decisions import already_applied
from router.rollouts.expectation import Names
from router.rollouts.happened import what_happened
from router.rollouts.outcome import Outcome
from router.rollouts.settings import RolloutPlan, RolloutSettings
from router.rollouts.transaction import Transaction


def version_to_stage(
    transaction: Transaction, organ: str, digest: str, plan: RolloutPlan, file_digest: str | None, names: Names
) -> Outcome | None:
    """Checks that a rollout of a version can begin.

    Args:
        transaction: the state.
        organ: the organ; one that is not in the live set is a new one.
        digest: the version.
        plan: its automatic steps.
        file_digest: the identity of the rollout file that asks for it, if one does.
        names: digest → what people call the version.

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
        # A file asks for its own steps, which a rollout begun otherwise does not have.
        if candidate.digest == digest and file_digest is None and not candidate.restores:
            words = f"it is in flight already, {candidate.state}: {what_happened(transaction, candidate, names)}"
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
    """The plan with the settings of now, so that a later change of them does not reach a rollout under way."""
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
