"""The conditions that end an automatic step, and their messages."""

from collections.abc import Sequence

from router.rollouts.settings import RolloutPlan, Step, Thresholds


def current_step(plan: RolloutPlan, next_step: int) -> Step | None:
    """The current step of a rollout; None before the first one."""
    return plan.steps[next_step - 1] if next_step else None


def step_waits_for(step: Step, thresholds: Thresholds, in_step_s: float, successes: int) -> list[str]:
    """The conditions that are not met yet, as text; empty if the step can end.

    Args:
        step: the step.
        thresholds: the rollout's.
        in_step_s: seconds since it began.
        successes: the candidate's successful requests since it began.
    """
    waits = []
    if in_step_s < step.hold_s:
        waits.append(f"the step's {step.hold_s:g} s")
    needed = thresholds.min_successes if step.min_successes is None else step.min_successes
    if successes < needed:
        missing = needed - successes
        waits.append(f"{missing} more successful request{'s' * (missing > 1)} of {needed}")
    return waits


def format_waits(waits: Sequence[str]) -> str:
    """Joins several conditions in one text."""
    return " and ".join(waits)
