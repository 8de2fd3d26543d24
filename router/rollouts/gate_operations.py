"""Operations on gates: adds gates to a candidate, and refuses to move a candidate that has not passed them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from router.errors import InvalidRolloutRequestError, RolloutStateError
from router.rollouts.argument_checks import check_actor
from router.rollouts.evaluations import GateStanding
from router.rollouts.formatting import format_number
from router.rollouts.gates import Evaluator, Gate, UnusableGateError
from router.rollouts.operation_checks import already, checked_candidate
from router.rollouts.outcome import Outcome
from router.rollouts.precondition import Names, Precondition
from router.rollouts.records import Rollout
from router.rollouts.settings import RolloutPlan, Step
from router.rollouts.states import Action
from router.rollouts.store import RolloutStore
from router.rollouts.transaction import Transaction

MAX_GATES = 16
# Rollout → progress of its gates as text.
Progress = Callable[[Rollout, GateStanding], str]


def format_gates(rollout: Rollout, standing: GateStanding) -> str:
    """The progress of gates as text, without the progress of the running evaluation."""
    if not standing.open:
        return ""
    position = standing.open[0]
    return f"gate {position + 1} of {len(standing.gates)}, {standing.gates[position].subject}"


def check_override(override: bool, reason: str) -> None:
    """Refuses an override without a reason.

    Raises:
        InvalidRolloutRequestError: there is no reason.
    """
    if override and not reason.strip():
        raise InvalidRolloutRequestError(
            "reason", "must say why the evaluations are overridden; it stands in the history"
        )


def check_gates(transaction: Transaction, rollout: Rollout, action: Action, override: bool) -> Mapping[str, Any]:
    """Refuses to give a candidate traffic before its gates are passed.

    Args:
        transaction: the state.
        rollout: the candidate.
        action: the requested action.
        override: whether the operator overrides the gates.

    Returns:
        Details of the override for the history; empty if nothing was overridden.

    Raises:
        RolloutStateError: a gate was not passed, or has not ended; the text has the figures.
    """
    if action not in (Action.CANARY, Action.PROMOTE):
        return {}
    standing = transaction.gate_standing(rollout)
    if standing.passed:
        return {}
    if override:
        open_gates = [standing.gates[position].model_dump(mode="json") for position in standing.open]
        return {"override": {"not_passed": [found.text for found in standing.failed], "not_evaluated": open_gates}}
    raise RolloutStateError(refusal(rollout, standing, action))


def refusal(rollout: Rollout, standing: GateStanding, action: Action) -> str:
    """Why a candidate cannot be moved, with the figures."""
    if standing.failed:
        return (
            f"{rollout.subject} did not pass its gates, so {action} is refused: {standing.figures}; roll it back, or "
            "override it, which needs a reason"
        )
    then = ""
    if rollout.automatic:
        then = f"; it {'goes on' if rollout.plan.steps else 'is promoted'} by itself once they are passed"
    return (
        f"{rollout.subject} has not passed its gates yet, so {action} is not possible: "
        f"{format_gates(rollout, standing)} is being evaluated{then}"
    )


class GateOperations:
    """Declares gates, and adds them to candidates in flight."""

    def __init__(self, store: RolloutStore, evaluator: Evaluator | None, names: Names) -> None:
        """Without an evaluator every gate is refused."""
        self._store = store
        self._evaluator = evaluator
        self._names = names

    def declared(self, gates: Sequence[Gate], organ: str, has_incumbent: bool) -> tuple[Gate, ...]:
        """Reads the gates' datasets and returns the gates with their digests.

        Raises:
            InvalidRolloutRequestError: a gate cannot be evaluated; the text has its index.
        """
        if gates and self._evaluator is None:
            raise InvalidRolloutRequestError("gates", "cannot be evaluated by this Control")
        if len(gates) > MAX_GATES:
            raise InvalidRolloutRequestError("gates", f"are {len(gates)}, and the limit is {MAX_GATES}")
        return tuple(self._declared(gate, index, organ, has_incumbent) for index, gate in enumerate(gates))

    def _declared(self, gate: Gate, index: int, organ: str, has_incumbent: bool) -> Gate:
        assert self._evaluator is not None
        field = f"gates[{index}]"
        if gate.organ != organ:
            raise InvalidRolloutRequestError(
                f"{field}.organ", f"is {gate.organ!r}, but the experts of {organ!r} are replaced: evaluate those"
            )
        if gate.not_below_incumbent_by is not None and not has_incumbent:
            raise InvalidRolloutRequestError(
                f"{field}.not_below_incumbent_by", f"needs a stable version, and {organ!r} is new: use at_least"
            )
        try:
            return self._evaluator.declare(gate)
        except UnusableGateError as error:
            raise InvalidRolloutRequestError(field, str(error)) from None

    def demand(
        self,
        action: Action,
        organ: str,
        percent: float | None,
        gates: Sequence[Gate],
        *,
        actor: str,
        reason: str,
        digest: str | None,
        expected: Precondition,
        dry_run: bool,
    ) -> Outcome:
        """Adds gates to the candidate. Once it has passed them, the action follows automatically.

        Existing gates stay, so none can be replaced by an easier one.

        Raises:
            InvalidRolloutRequestError: a gate cannot be evaluated.
            RolloutStateError: there is no candidate, or it failed an existing gate.
        """
        check_actor(actor)

        def candidate(transaction: Transaction, digest: str | None) -> tuple[Rollout, str]:
            found, target = checked_candidate(transaction, action, organ, digest, percent, expected, self._names)
            done = (found.state, found.percent) == (target, percent)
            return found, already(transaction, found, self._names) if done else ""

        with self._store.read() as transaction:
            rollout, done = candidate(transaction, digest)
            has_incumbent = transaction.snapshot().live(organ) is not None
        if done:
            return Outcome(organ, False, (done,), rollout)
        declared = self.declared(gates, organ, has_incumbent)
        with self._store.read() if dry_run else self._store.write() as transaction:
            rollout, done = candidate(transaction, rollout.digest)
            if done:
                return Outcome(organ, False, (done,), rollout)
            plan = _plan(rollout.plan, declared, action, percent)
            standing = transaction.gate_standing(rollout)
            if standing.failed:
                raise RolloutStateError(refusal(rollout, standing, action))
            if rollout.automatic and plan == rollout.plan:
                words = format_gates(rollout, standing) or "passed"
                return Outcome(organ, False, (f"its gates are demanded already: {words}",), rollout)
            if not dry_run:
                rollout = transaction.require_gates(rollout, plan, actor=actor, reason=reason)
        return Outcome(organ, True, gate_steps(plan), rollout)


def gate_steps(plan: RolloutPlan) -> tuple[str, ...]:
    """The steps that follow when gates are added."""
    steps = [f"it is evaluated in parallel to the requests, and gets none: {_demand(gate)}" for gate in plan.gates]
    if plan.promote:
        steps.append("it becomes stable by itself once it has passed; otherwise an operator decides")
    for step in plan.steps:
        steps.append(f"it answers {format_number(step.percent)} % of the requests by itself once it has passed")
    return tuple(steps)


def _demand(gate: Gate) -> str:
    demands = []
    if gate.at_least is not None:
        demands.append(f"at least {gate.at_least:g}")
    if gate.not_below_incumbent_by is not None:
        demands.append(f"not below the incumbent by more than {gate.not_below_incumbent_by:g}")
    return f"{gate.subject} must be {' and '.join(demands)}"


def _plan(plan: RolloutPlan, gates: Sequence[Gate], action: Action, percent: float | None) -> RolloutPlan:
    """A rollout's plan with further gates, which ends with the requested action."""
    further = [gate for gate in gates if gate not in plan.gates]
    steps = () if percent is None else (Step(percent=percent, hold_s=0, min_successes=0),)
    update = {"gates": (*plan.gates, *further), "steps": steps, "promote": action == Action.PROMOTE}
    return plan.model_copy(update=update)
