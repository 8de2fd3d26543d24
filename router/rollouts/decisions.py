"""What an operation finds, and refuses, in the state that it reads."""

from router.errors import RolloutStateError, UnknownOrganError, UnknownRolloutError
from router.rollouts.outcome import Outcome
from router.rollouts.records import Rollout, Snapshot
from router.rollouts.states import Action, State, next_state
from router.rollouts.transaction import Transaction

_ENDED_BADLY = (State.FAILED, State.ROLLED_BACK)


def check_known(snapshot: Snapshot, organ: str) -> None:
    """Refuses an organ that was never served or staged.

    Raises:
        UnknownOrganError: the text names those that there are.
    """
    if organ not in snapshot.known_organs:
        raise UnknownOrganError(f"there is no organ {organ[:64]!r}: there are {', '.join(snapshot.known_organs)}")


def checked_candidate(
    transaction: Transaction, action: Action, organ: str, digest: str | None
) -> tuple[Rollout, State]:
    """The rollout that canary, shadow or promote is about, and the state that it shall have.

    With nothing in flight, and the organ's newest rollout stable already, that one: promoting it again is no error.

    Raises:
        UnknownOrganError: there is no such organ.
        RolloutStateError: there is no candidate, it is another one, or it cannot do this now.
    """
    snapshot = transaction.snapshot()
    check_known(snapshot, organ)
    candidate = snapshot.candidate(organ)
    if candidate is None:
        newest = next(iter(transaction.rollouts(organ=organ, limit=1)), None)
        if action == Action.PROMOTE and newest and newest.state == State.STABLE and digest in (None, newest.digest):
            return newest, State.STABLE
        raise RolloutStateError(
            f"nothing is in flight for {organ!r}, so {action} is not possible"
            f"{_ending(newest)}; possible: stage, rollback, retire"
        )
    if digest is not None and candidate.digest != digest:
        raise RolloutStateError(
            f"{action} was asked for the bundle {digest[:12]}…, but {candidate.subject} is in flight, {candidate.state}"
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
    return candidate, target


def roll_back_candidate(
    transaction: Transaction,
    snapshot: Snapshot,
    candidate: Rollout,
    actor: str,
    reason: str,
    digest: str | None,
    dry_run: bool,
) -> Outcome:
    """Takes a candidate back, unless the one in flight is itself the rollback that was asked for.

    Raises:
        UnknownRolloutError: the digest is neither candidate nor stable.
        RolloutStateError: the digest is the stable version's, and a candidate is in flight.
    """
    organ = candidate.organ
    live = snapshot.live(organ)
    stable = live.stable_digest if live else None
    if candidate.restores and digest in (None, stable):
        return Outcome(organ, False, (f"{candidate.digest[:12]}… is being brought back already",), candidate)
    if digest not in (None, candidate.digest):
        if digest == stable:
            raise RolloutStateError(
                f"{candidate.subject} is {candidate.state}; roll it back or promote it before the stable version"
            )
        return rolled_back_before(transaction, organ, str(digest))
    if not dry_run:
        reason = reason or "asked by an operator"
        candidate = transaction.move(candidate, Action.ROLL_BACK, actor=actor, reason=reason)
    steps = ("the candidate gets no new request; those under way end with it", "then it is unloaded from all replicas")
    return Outcome(organ, True, steps, candidate)


def rolled_back_before(transaction: Transaction, organ: str, digest: str) -> Outcome:
    """The answer for a version that neither is stable nor in flight: it may have been taken back already.

    Raises:
        UnknownRolloutError: it was not.
    """
    for rollout in transaction.rollouts(organ=organ):
        if rollout.digest == digest and rollout.state in _ENDED_BADLY:
            return Outcome(organ, False, (f"it is {rollout.state} already",), rollout)
    raise UnknownRolloutError(f"{digest[:12]}… is neither the stable version of {organ!r} nor in flight")


def already_applied(rollout: Rollout) -> str:
    """What became of a rollout file that was applied before."""
    again = "; to try again, raise `attempt` in the file" if rollout.state in _ENDED_BADLY else ""
    return f"this file was applied before: its rollout {rollout.id} is {rollout.state}{_because(rollout)}{again}"


def _ending(rollout: Rollout | None) -> str:
    return f" (the last one, {rollout.id}, is {rollout.state}{_because(rollout)})" if rollout else ""


def _because(rollout: Rollout) -> str:
    return f": {rollout.reason}" if rollout.reason else ""
