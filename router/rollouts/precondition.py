"""Preconditions: an operation succeeds only if the organ is in the state that its caller saw (compare and set)."""

from collections.abc import Callable
from dataclasses import dataclass

from router.errors import RolloutStateError
from router.rollouts.formatting import format_state
from router.rollouts.last_event import format_last_event
from router.rollouts.records import Rollout, Snapshot
from router.rollouts.states import State
from router.rollouts.transaction import Transaction


@dataclass(frozen=True, slots=True)
class Precondition:
    """The state that a caller saw. Fields at their default are not compared.

    Attributes:
        rollout_id: the rollout that the call applies to.
        state: the state of that rollout.
        percent: its share of the requests.
        stable_digest: the organ's stable version.
        nothing_in_flight: whether the organ had no rollout in flight.
    """

    rollout_id: str = ""
    state: str = ""
    percent: float | None = None
    stable_digest: str = ""
    nothing_in_flight: bool = False


NO_PRECONDITION = Precondition()
# Digest → the version's name in messages.
Names = Callable[[str], str]


def check_precondition(
    transaction: Transaction, snapshot: Snapshot, organ: str, expected: Precondition, names: Names
) -> None:
    """Refuses an operation whose caller saw another state.

    Raises:
        RolloutStateError: the state changed; the text names the change, its author and its time.
    """
    candidate = snapshot.candidate(organ)
    if expected.nothing_in_flight and candidate is not None:
        raise RolloutStateError(
            f"the caller saw nothing in flight for {organ!r}, but {format_last_event(transaction, candidate, names)}; "
            "nothing was changed: look at it and ask again"
        )
    if expected.rollout_id and candidate is not None and candidate.id == expected.rollout_id:
        _check_candidate(transaction, candidate, expected, names)
    live = snapshot.live(organ)
    if expected.stable_digest and (live is None or live.stable_digest != expected.stable_digest):
        now = "is not served any more" if live is None else f"is at {names(live.stable_digest)} now"
        newest = next(iter(transaction.rollouts(organ=organ, limit=1)), None)
        because = f": {format_last_event(transaction, newest, names)}" if newest is not None else ""
        raise RolloutStateError(
            f"the caller saw {organ} {names(expected.stable_digest)} as the stable version, but {organ} {now}"
            f"{because}; nothing was changed: look at it and ask again"
        )


def _check_candidate(transaction: Transaction, candidate: Rollout, expected: Precondition, names: Names) -> None:
    moved = expected.state and candidate.state != expected.state
    shifted = expected.percent is not None and (candidate.percent or 0.0) != expected.percent
    if not moved and not shifted:
        return
    known = expected.state in list(State)
    seen = format_state(State(expected.state), expected.percent or None) if known else repr(expected.state[:32])
    raise RolloutStateError(
        f"the caller saw {candidate.id} as {seen}, but it is {format_state(candidate.state, candidate.percent)}: "
        f"{format_last_event(transaction, candidate, names)}; nothing was changed: look at it and ask again"
    )
