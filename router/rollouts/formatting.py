"""Formats states, numbers and durations, and describes the steps that an operation starts."""

from router.rollouts.records import Rollout
from router.rollouts.settings import RolloutPlan
from router.rollouts.states import State


def format_state(state: State, percent: float | None) -> str:
    """A state with its share of the traffic, for example "canary 5 %"."""
    return str(state) if percent is None else f"{state} {format_number(percent)} %"


def format_number(number: float) -> str:
    """The shortest text that reads back as the same number: 5, 0.25 or 100.0001."""
    short = f"{number:g}"
    return short if float(short) == number or number != number else repr(number)


def format_duration(seconds: float) -> str:
    """Seconds with a unit that keeps the number short, for example "3 min"."""
    seconds = max(0.0, seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def stage_steps(organ: str, is_new: bool, plan: RolloutPlan) -> tuple[str, ...]:
    """The steps that follow when a rollout is staged. Every field of the plan must be set."""
    steps = ["the bundle is read and verified", f"it is loaded on every replica of {organ}; no request uses it yet"]
    assert plan.thresholds is not None
    if plan.gates:
        listed = ", ".join(gate.subject for gate in plan.gates)
        steps.append(f"it is evaluated in parallel to the requests, and gets none before it has passed: {listed}")
    for step in plan.steps:
        verb = "answers" if step.mode == "canary" else "computes, unseen,"
        needed = plan.thresholds.min_successes if step.min_successes is None else step.min_successes
        until = f" and until {needed} of them succeeded" if needed else ""
        steps.append(f"it {verb} {format_number(step.percent)} % of the requests for {step.hold_s:g} s{until}")
    if plan.promote:
        place = "joins the live set" if is_new else "becomes stable"
        steps.append(f"it {place}, unless its thresholds took it back before")
        if plan.watch_after_promotion_s and not is_new:
            steps.append(f"for {plan.watch_after_promotion_s:g} s the version before is kept to go back to")
    else:
        steps.append("it then waits for an operator: canary, shadow, promote or rollback")
    return tuple(steps)


def traffic_steps(target: State, organ: str, percent: float | None, rollout: Rollout) -> tuple[str, ...]:
    """The steps that follow when a warm candidate is moved."""
    candidate = f"{rollout.digest[:12]}…"
    part = "" if percent is None else format_number(percent)
    if target == State.CANARY:
        return (f"{candidate} answers {part} % of the requests to {organ}; those under way end as they began",)
    if target == State.SHADOW:
        return (
            f"{candidate} computes {part} % of the requests to {organ} beside the incumbent",
            "its answers are compared and thrown away",
        )
    if rollout.incumbent_digest is None:
        return (f"{organ} joins the live set with {candidate}",)
    before = f"{rollout.incumbent_digest[:12]}…"
    watch_s = rollout.plan.watch_after_promotion_s
    return (
        f"{candidate} answers all new requests to {organ}; those under way end as they began",
        f"{before} stays loaded for {watch_s:g} s, and comes back by itself if {candidate} fails"
        if watch_s
        else f"{before} is unloaded once no request uses it",
    )
