"""Describes the last event of a rollout: what, by whom, how long ago and why."""

from collections.abc import Callable, Mapping
from datetime import datetime

from router.rollouts import history
from router.rollouts.formatting import format_duration, format_state
from router.rollouts.records import Rollout
from router.rollouts.states import Action
from router.rollouts.transaction import CONTROLLER, Transaction

_VERBS: Mapping[str, str] = {
    Action.STAGE: "was staged",
    Action.VERIFY: "was verified",
    Action.WARM_UP: "was loaded on every replica",
    Action.PROMOTE: "was promoted",
    Action.SUPERSEDE: "was superseded",
    Action.FAIL: "failed",
    Action.FAILING: "was found to fail",
    Action.ROLL_BACK: "was rolled back",
    Action.GATE: "was given gates",
    Action.EVALUATE: "was evaluated",
    Action.RETIRE: "was retired",
    Action.RETIRE_ORGAN: "was retired",
    Action.RETIRE_VERSION: "was retired",
}


def format_last_event(transaction: Transaction, rollout: Rollout, names: Callable[[str], str]) -> str:
    """The last change of a rollout, for example "heart-12 (1.1.0) was rolled back by ann 6 s ago: too slow".

    Args:
        transaction: where it is read.
        rollout: the rollout.
        names: digest → what people call the version.
    """
    entry = history.newest(transaction.connection, rollout_id=rollout.id)
    subject = f"{rollout.id} ({names(rollout.digest)})"
    if entry is None:
        return f"{subject} is {format_state(rollout.state, rollout.percent)}"
    verb = _VERBS.get(entry.action) or f"was made {format_state(rollout.state, rollout.percent)}"
    return f"{subject} {verb}{_by(transaction, entry)}"


def format_retirement(transaction: Transaction, organ: str, digest: str = "") -> str:
    """Who retired an organ, or with a digest one of its versions, for example " by ann 6 s ago"."""
    action = Action.RETIRE_VERSION if digest else Action.RETIRE_ORGAN
    entry = history.newest(transaction.connection, organ=organ, action=action, digest=digest)
    return "" if entry is None else _by(transaction, entry)


def format_since(transaction: Transaction, at: float) -> str:
    """The time since `at`, for example "6 s ago"."""
    return f"{format_duration(transaction.now - at)} ago"


def _by(transaction: Transaction, entry: history.Entry) -> str:
    who = "the controller" if entry.actor == CONTROLLER else entry.actor
    by = "" if entry.action == Action.FAIL else f" by {who}"
    because = f": {entry.reason}" if entry.reason else ""
    return f"{by} {format_since(transaction, datetime.fromisoformat(entry.at).timestamp())}{because}"
