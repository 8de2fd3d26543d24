"""Checks that several operations share."""

from router.errors import RolloutStateError, UnknownOrganError
from router.rollouts.formatting import format_state
from router.rollouts.last_event import format_last_event
from router.rollouts.precondition import NO_PRECONDITION, Names, Precondition, check_precondition
from router.rollouts.records import Rollout, Snapshot
from router.rollouts.states import Action, State, next_state
from router.rollouts.transaction import Transaction

ENDED_BADLY = (State.FAILED, State.ROLLED_BACK)


def check_known(snapshot: Snapshot, organ: str) -> None:
    """Refuses an organ that was never live or staged.

    Raises:
        UnknownOrganError: the text lists the known organs.
    """
    if organ not in snapshot.known_organs:
        raise UnknownOrganError(f"there is no organ {organ[:64]!r}: there are {', '.join(snapshot.known_organs)}")


def checked_candidate(
    transaction: Transaction,
    action: Action,
    organ: str,
    digest: str | None,
    percent: float | None = None,
    expected: Precondition = NO_PRECONDITION,
    names: Names = str,
) -> tuple[Rollout, State]:
    """The rollout that canary, shadow or promote applies to, and its target state.

    With nothing in flight, the organ's newest rollout if it is stable: promoting it again is not an error.

    Args:
        transaction: the state.
        action: the requested action.
        organ: the organ.
        digest: when given, only if this is the candidate.
        percent: the requested share of the requests, if the state has one.
        expected: the precondition; not checked if the rollout is in the target state already.
        names: digest → what people call the version.

    Raises:
        UnknownOrganError: there is no such organ.
        RolloutStateError: there is no candidate, it is another one, or the action is not possible in its state; the
            text has the last event.
    """
    snapshot = transaction.snapshot()
    check_known(snapshot, organ)
    candidate = snapshot.candidate(organ)
    if candidate is None:
        newest = next(iter(transaction.rollouts(organ=organ, limit=1)), None)
        meant = newest and digest in (None, newest.digest) and expected.rollout_id in ("", newest.id)
        if action == Action.PROMOTE and newest and newest.state == State.STABLE and meant:
            return newest, State.STABLE
        happened = f" ({format_last_event(transaction, newest, names)})" if newest else ""
        raise RolloutStateError(
            f"nothing is in flight for {organ!r}, so {action} is not possible{happened}; possible: stage, retire"
        )
    if (digest is not None and candidate.digest != digest) or expected.rollout_id not in ("", candidate.id):
        asked = expected.rollout_id[:96] or f"the bundle {names(str(digest))}"
        raise RolloutStateError(
            f"{action} was asked for {asked}, but {candidate.subject} is in flight, {candidate.state}: "
            f"{format_last_event(transaction, candidate, names)}"
        )
    if candidate.restores:
        raise RolloutStateError(
            f"{candidate.subject} is {candidate.state} and brings back an earlier version, which becomes stable by "
            f"itself, so {action} is not possible; possible: rollback with its digest, to stop it"
        )
    target = next_state(candidate.state, action, candidate.subject)
    if target == State.SHADOW and snapshot.live(organ) is None:
        raise RolloutStateError(
            f"{organ!r} is new and has no version that a shadow could be compared with; possible: canary, promote, "
            "rollback"
        )
    if (candidate.state, candidate.percent) != (target, percent):
        check_precondition(transaction, snapshot, organ, expected, names)
    return candidate, target


def already(transaction: Transaction, rollout: Rollout, names: Names) -> str:
    """The message for a rollout that is in the target state already: since when, and by whom."""
    state = format_state(rollout.state, rollout.percent)
    return f"it is {state} already: {format_last_event(transaction, rollout, names)}"


def already_applied(rollout: Rollout) -> str:
    """The message for a rollout file that was applied before."""
    again = "; to try again, raise `attempt` in the file" if rollout.state in ENDED_BADLY else ""
    return f"this file was applied before: its rollout {rollout.id} is {rollout.state}{_because(rollout)}{again}"


def _because(rollout: Rollout) -> str:
    return f": {rollout.reason}" if rollout.reason else ""
