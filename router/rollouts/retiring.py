"""The checks before an organ or a version is retired."""

from router.errors import RolloutStateError
from router.rollouts.last_event import format_retirement
from router.rollouts.operation_checks import check_known
from router.rollouts.outcome import Outcome
from router.rollouts.precondition import Names, Precondition, check_precondition
from router.rollouts.transaction import Transaction


def organ_to_retire(transaction: Transaction, organ: str, expected: Precondition, names: Names) -> Outcome | None:
    """Checks that an organ can be removed from the live set.

    Args:
        transaction: the state.
        organ: the organ.
        expected: the precondition.
        names: digest → the version's name in messages.

    Returns:
        the outcome where the organ is not in the live set; otherwise None.

    Raises:
        UnknownOrganError: there is no such organ.
        RolloutStateError: a rollout of it is in flight, it is the last one, or the precondition does not hold.
    """
    snapshot = transaction.snapshot()
    check_known(snapshot, organ)
    if candidate := snapshot.candidate(organ):
        raise RolloutStateError(
            f"{candidate.subject} is {candidate.state}, so {organ!r} cannot be retired; roll it back first"
        )
    if snapshot.live(organ) is None:
        retired = ""
        if (organ, "") in snapshot.retired:
            retired = f": it was retired{format_retirement(transaction, organ)} already"
        return Outcome(organ, False, (f"{organ} is not in the live set{retired}; nothing to do",))
    check_precondition(transaction, snapshot, organ, expected, names)
    if len(snapshot.organs) == 1:
        raise RolloutStateError(f"{organ!r} is the last organ of the live set; stop the system instead")
    return None


def version_to_retire(
    transaction: Transaction, organ: str, digest: str, expected: Precondition, names: Names
) -> Outcome | None:
    """Checks that a version can be retired.

    Args:
        transaction: the state.
        organ: the organ.
        digest: the version.
        expected: the precondition.
        names: digest → the version's name in messages.

    Returns:
        the outcome where the version is retired already; otherwise None.

    Raises:
        UnknownOrganError: there is no such organ.
        RolloutStateError: the version is stable or in flight, or the precondition does not hold.
    """
    snapshot = transaction.snapshot()
    check_known(snapshot, organ)
    if (organ, digest) in snapshot.retired:
        words = f"{names(digest)} was retired{format_retirement(transaction, organ, digest)} already; nothing to do"
        return Outcome(organ, False, (words,))
    live, candidate = snapshot.live(organ), snapshot.candidate(organ)
    if live is not None and live.stable_digest == digest:
        raise RolloutStateError(
            f"{digest[:12]}… is the stable version of {organ!r} and cannot be retired; promote another one, "
            "roll it back, or retire the organ"
        )
    if candidate is not None and candidate.digest == digest:
        raise RolloutStateError(f"{candidate.subject} is {candidate.state}; roll it back before retiring it")
    check_precondition(transaction, snapshot, organ, expected, names)
    return None
