"""Rollbacks of the candidate and of the stable version. The two are never taken for each other."""

from router.errors import InvalidRolloutRequestError, RolloutStateError, UnknownRolloutError
from router.rollouts.decisions import ENDED_BADLY, check_known
from router.rollouts.expectation import Expectation, Names, check_expected
from router.rollouts.happened import since, what_happened
from router.rollouts.outcome import Outcome
from router.rollouts.records import LiveOrgan, Rollout, Snapshot
from router.rollouts.states import State
from router.rollouts.transaction import Transaction


def candidate_to_take_back(
    transaction: Transaction, organ: str, digest: str | None, expected: Expectation, names: Names
) -> Rollout | Outcome:
    """The candidate that a rollback is about, or the outcome where it was taken back already.

    Args:
        transaction: the state.
        organ: the organ.
        digest: when given, only if this is the candidate.
        expected: what the caller saw.
        names: digest → what people call the version.

    Raises:
        UnknownOrganError: there is no such organ.
        UnknownRolloutError: there is no such rollout, or the organ never had this version.
        RolloutStateError: nothing is in flight, or something else; the text says what happened since.
    """
    snapshot = transaction.snapshot()
    check_known(snapshot, organ)
    candidate = snapshot.candidate(organ)
    named = _named(transaction, organ, digest, expected)
    if named is not None and named.state in ENDED_BADLY:
        return Outcome(organ, False, (f"done already: {what_happened(transaction, named, names)}",), named)
    if candidate is None:
        live = snapshot.live(organ)
        if digest is not None and named is None and (live is None or live.stable_digest != digest):
            raise UnknownRolloutError(f"{names(digest)} is neither the stable version of {organ!r} nor in flight")
        raise RolloutStateError(_nothing_in_flight(transaction, snapshot, organ, names))
    if named is not None and named.id != candidate.id:
        raise RolloutStateError(
            f"{what_happened(transaction, named, names)}, so it cannot be rolled back; in flight is {candidate.id} "
            f"({names(candidate.digest)}), {candidate.state}, which was left as it is: to take that one back, name it "
            f"(`echoray experts rollback {organ} --rollout {candidate.id}`)"
        )
    if digest is not None and digest != candidate.digest:
        raise _other_digest(snapshot, candidate, digest, names)
    if candidate.restores and named is None and digest is None:
        raise RolloutStateError(
            f"{candidate.id} brings back {names(candidate.digest)}, as {candidate.actor} asked "
            f"{since(transaction, candidate.created_at)}; it goes on. To stop that and keep what is stable now, name "
            f"it (`echoray experts rollback {organ} --rollout {candidate.id}`)"
        )
    check_expected(transaction, snapshot, organ, expected, names)
    return candidate


def version_to_go_back_to(
    transaction: Transaction, organ: str, digest: str, expected: Expectation, names: Names
) -> str | Outcome:
    """The digest that was stable before an organ's stable version, or the outcome where that is gone already.

    Args:
        transaction: the state.
        organ: the organ.
        digest: the version to go back from, which must be the stable one.
        expected: what the caller saw.
        names: digest → what people call the version.

    Raises:
        UnknownOrganError: there is no such organ.
        RolloutStateError: another version is stable, a candidate is in flight, or there is none to go back to.
    """
    snapshot = transaction.snapshot()
    check_known(snapshot, organ)
    live, candidate = snapshot.live(organ), snapshot.candidate(organ)
    if candidate is not None and candidate.restores and candidate.incumbent_digest == digest:
        words = (
            f"{names(candidate.digest)} is being brought back already: {candidate.actor} asked "
            f"{since(transaction, candidate.created_at)} ({candidate.id}, {candidate.state})"
        )
        return Outcome(organ, False, (words,), candidate)
    if live is None or live.stable_digest != digest:
        return _went_back_before(transaction, snapshot, organ, digest, names)
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
    check_expected(transaction, snapshot, organ, expected, names)
    return live.previous[-1]


def _named(transaction: Transaction, organ: str, digest: str | None, expected: Expectation) -> Rollout | None:
    """The rollout that the caller means, if it says which; by its digest the newest one of the organ."""
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
    happened = "no rollout of it was begun yet" if newest is None else what_happened(transaction, newest, names)
    return f"nothing is in flight for {organ!r}, and nothing was changed: {happened}. {_stable(snapshot, organ, names)}"


def _stable(snapshot: Snapshot, organ: str, names: Names) -> str:
    live = snapshot.live(organ)
    if live is None:
        return f"{organ} is not served"
    return f"{organ} {names(live.stable_digest)} is stable{_way_back(live, names)}"


def _way_back(live: LiveOrgan, names: Names) -> str:
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


def _went_back_before(transaction: Transaction, snapshot: Snapshot, organ: str, digest: str, names: Names) -> Outcome:
    """The answer for a version that is not stable: it may have been gone back from already.

    Raises:
        RolloutStateError: it was not; the text says what is stable, and since when.
    """
    rollouts = transaction.rollouts(organ=organ)
    back = next((found for found in rollouts if found.restores and found.incumbent_digest == digest), None)
    # What came after it is another story, which the error tells.
    if back is not None and rollouts[0].id == back.id and back.state == State.STABLE:
        words = f"done already: {back.actor} went back from {names(digest)} {since(transaction, back.created_at)}"
        return Outcome(organ, False, (f"{words} ({back.id}); {_stable(snapshot, organ, names)}",), back)
    newest = rollouts[0] if rollouts else None
    happened = "" if newest is None else f"{what_happened(transaction, newest, names)}. "
    raise RolloutStateError(
        f"{names(digest)} is not the stable version of {organ!r}, and nothing was changed: "
        f"{happened}{_stable(snapshot, organ, names)}"
    )
