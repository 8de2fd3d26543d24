"""The checks before a rollback of the candidate, or of the stable version."""

from router.errors import InvalidRolloutRequestError, RolloutStateError, UnknownRolloutError
from router.rollouts.last_event import format_last_event, format_since
from router.rollouts.operation_checks import ENDED_BADLY, check_known
from router.rollouts.outcome import Outcome
from router.rollouts.precondition import Names, Precondition, check_precondition
from router.rollouts.records import LiveOrgan, Rollout, Snapshot
from router.rollouts.states import State
from router.rollouts.transaction import Transaction


def candidate_to_roll_back(
    transaction: Transaction, organ: str, digest: str | None, expected: Precondition, names: Names
) -> Rollout | Outcome:
    """The candidate to roll back, or the outcome if it was rolled back already.

    Args:
        transaction: the state.
        organ: the organ.
        digest: when given, only if this is the candidate.
        expected: the precondition.
        names: digest → the version's name in messages.

    Raises:
        UnknownOrganError: there is no such organ.
        UnknownRolloutError: there is no such rollout, or the organ never had this version.
        RolloutStateError: nothing is in flight, or another candidate; the text has the last event.
    """
    snapshot = transaction.snapshot()
    check_known(snapshot, organ)
    candidate = snapshot.candidate(organ)
    named = _named(transaction, organ, digest, expected)
    if named is not None and named.state in ENDED_BADLY:
        return Outcome(organ, False, (f"done already: {format_last_event(transaction, named, names)}",), named)
    if candidate is None:
        live = snapshot.live(organ)
        if digest is not None and named is None and (live is None or live.stable_digest != digest):
            raise UnknownRolloutError(f"{names(digest)} is neither the stable version of {organ!r} nor in flight")
        raise RolloutStateError(_nothing_in_flight(transaction, snapshot, organ, names))
    if named is not None and named.id != candidate.id:
        raise RolloutStateError(
            f"{format_last_event(transaction, named, names)}, so it cannot be rolled back; in flight is {candidate.id} "
            f"({names(candidate.digest)}), {candidate.state}, which was left as it is: to take that one back, name it "
            f"(`echoray experts rollback {organ} --rollout {candidate.id}`)"
        )
    if digest is not None and digest != candidate.digest:
        raise _other_digest(snapshot, candidate, digest, names)
    if candidate.restores and named is None and digest is None:
        raise RolloutStateError(
            f"{candidate.id} brings back {names(candidate.digest)}, as {candidate.actor} asked "
            f"{format_since(transaction, candidate.created_at)}; it continues. To stop it and keep the stable version, "
            f"name it (`echoray experts rollback {organ} --rollout {candidate.id}`)"
        )
    check_precondition(transaction, snapshot, organ, expected, names)
    return candidate


def version_to_restore(
    transaction: Transaction, organ: str, digest: str, expected: Precondition, names: Names
) -> str | Outcome:
    """The digest of the previous stable version, or the outcome if it was restored already.

    Args:
        transaction: the state.
        organ: the organ.
        digest: the version to roll back, which must be the stable one.
        expected: the precondition.
        names: digest → the version's name in messages.

    Raises:
        UnknownOrganError: there is no such organ.
        RolloutStateError: another version is stable, a candidate is in flight, or there is no previous version.
    """
    snapshot = transaction.snapshot()
    check_known(snapshot, organ)
    live, candidate = snapshot.live(organ), snapshot.candidate(organ)
    if candidate is not None and candidate.restores and candidate.incumbent_digest == digest:
        words = (
            f"{names(candidate.digest)} is being brought back already: {candidate.actor} asked "
            f"{format_since(transaction, candidate.created_at)} ({candidate.id}, {candidate.state})"
        )
        return Outcome(organ, False, (words,), candidate)
    if live is None or live.stable_digest != digest:
        return _rolled_back_before(transaction, snapshot, organ, digest, names)
    if candidate is not None:
        raise RolloutStateError(
            f"{candidate.id} ({names(candidate.digest)}) is {candidate.state}; roll it back or promote it before going "
            f"back from the stable version (`echoray experts rollback {organ} --rollout {candidate.id}`)"
        )
    if not live.previous:
        raise RolloutStateError(
            f"the stable version of {organ!r}, {names(digest)}, has none before it to go back to; stage the version "
            "that you want"
        )
    check_precondition(transaction, snapshot, organ, expected, names)
    return live.previous[-1]


def _named(transaction: Transaction, organ: str, digest: str | None, expected: Precondition) -> Rollout | None:
    """The rollout that the caller named, by its id, or the organ's newest one with the digest."""
    if expected.rollout_id:
        rollout = transaction.rollout(expected.rollout_id)
        if rollout.organ != organ:
            raise InvalidRolloutRequestError("rollout_id", f"{rollout.id} is a rollout of {rollout.organ!r}")
        return rollout
    if digest is None:
        return None
    return next((found for found in transaction.rollouts(organ=organ) if found.digest == digest), None)


def _nothing_in_flight(transaction: Transaction, snapshot: Snapshot, organ: str, names: Names) -> str:
    newest = next(iter(transaction.rollouts(organ=organ, limit=1)), None)
    happened = "no rollout of it was begun yet" if newest is None else format_last_event(transaction, newest, names)
    return f"nothing is in flight for {organ!r}, and nothing was changed: {happened}. {_stable(snapshot, organ, names)}"


def _stable(snapshot: Snapshot, organ: str, names: Names) -> str:
    live = snapshot.live(organ)
    if live is None:
        return f"{organ} is not served"
    return f"{organ} {names(live.stable_digest)} is stable{_rollback_hint(live, names)}"


def _rollback_hint(live: LiveOrgan, names: Names) -> str:
    if not live.previous:
        return " and has no version before it"
    return (
        f"; to go back from it to {names(live.previous[-1])}: "
        f"`echoray experts rollback {live.organ} --stable {names(live.stable_digest).rstrip('…')}`"
    )


def _other_digest(snapshot: Snapshot, candidate: Rollout, digest: str, names: Names) -> Exception:
    live = snapshot.live(candidate.organ)
    there = f"{candidate.id} ({names(candidate.digest)}) is {candidate.state}"
    if live is not None and live.stable_digest == digest:
        return RolloutStateError(
            f"{names(digest)} is the stable version of {candidate.organ!r}, which a rollback of the candidate does not "
            f"touch; {there}, and was left as it is"
        )
    return UnknownRolloutError(
        f"{names(digest)} is neither the stable version of {candidate.organ!r} nor in flight; {there}"
    )


def _rolled_back_before(transaction: Transaction, snapshot: Snapshot, organ: str, digest: str, names: Names) -> Outcome:
    """The outcome for a version that is not stable, if it was rolled back already.

    Raises:
        RolloutStateError: it was not; the text names the stable version and the last event.
    """
    rollouts = transaction.rollouts(organ=organ)
    back = next((found for found in rollouts if found.restores and found.incumbent_digest == digest), None)
    # If another rollout followed, the error reports that one.
    if back is not None and rollouts[0].id == back.id and back.state == State.STABLE:
        words = (
            f"done already: {back.actor} went back from {names(digest)} {format_since(transaction, back.created_at)}"
        )
        return Outcome(organ, False, (f"{words} ({back.id}); {_stable(snapshot, organ, names)}",), back)
    newest = rollouts[0] if rollouts else None
    happened = "" if newest is None else f"{format_last_event(transaction, newest, names)}. "
    raise RolloutStateError(
        f"{names(digest)} is not the stable version of {organ!r}, and nothing was changed: "
        f"{happened}{_stable(snapshot, organ, names)}"
    )
