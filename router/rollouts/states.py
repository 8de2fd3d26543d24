"""The states of a rollout and the table of their transitions."""

from collections.abc import Mapping
from enum import StrEnum

from router.errors import RolloutStateError


class State(StrEnum):
    """Where a rollout stands."""

    # The bundle is named; nothing was looked at.
    STAGED = "staged"
    # The bundle is what it says, and fits; it is being loaded.
    VERIFIED = "verified"
    # Loaded on every replica; no request uses it.
    WARM = "warm"
    # A part of the requests is computed with it too, and its answers are discarded.
    SHADOW = "shadow"
    # A part of the requests is answered by it.
    CANARY = "canary"
    # The organ's version for all requests.
    STABLE = "stable"
    # It was stable until another version took its place.
    SUPERSEDED = "superseded"
    # It could not be used; the reason is in the rollout.
    FAILED = "failed"
    # An operator or its thresholds took it back.
    ROLLED_BACK = "rolled_back"
    # It was stable, and then it or its organ was retired.
    RETIRED = "retired"


class Action(StrEnum):
    """What moves a rollout. The history names entries by these, and by the ones that concern no rollout."""

    STAGE = "stage"
    VERIFY = "verify"
    WARM_UP = "warm_up"
    SHADOW = "shadow"
    CANARY = "canary"
    PROMOTE = "promote"
    SUPERSEDE = "supersede"
    FAIL = "fail"
    ROLL_BACK = "rollback"
    RETIRE = "retire"
    # Moves nothing: a stable version fails after its promotion, and there is none to go back to.
    FAILING = "failing"
    # Move nothing: an operator demands evaluations, and what one of them found.
    GATE = "gate"
    EVALUATE = "evaluate"
    # Concern no rollout.
    ADOPT = "adopt"
    RETIRE_ORGAN = "retire_organ"
    RETIRE_VERSION = "retire_version"


_ENDS: Mapping[Action, State] = {Action.FAIL: State.FAILED, Action.ROLL_BACK: State.ROLLED_BACK}
_TRAFFIC: Mapping[Action, State] = {
    Action.SHADOW: State.SHADOW,
    Action.CANARY: State.CANARY,
    Action.PROMOTE: State.STABLE,
}

# From a state, by an action, to a state. What is not here is not possible.
TRANSITIONS: Mapping[State, Mapping[Action, State]] = {
    State.STAGED: {Action.VERIFY: State.VERIFIED, **_ENDS},
    State.VERIFIED: {Action.WARM_UP: State.WARM, **_ENDS},
    State.WARM: {**_TRAFFIC, **_ENDS},
    State.SHADOW: {**_TRAFFIC, **_ENDS},
    State.CANARY: {**_TRAFFIC, **_ENDS},
    State.STABLE: {
        Action.SUPERSEDE: State.SUPERSEDED,
        Action.ROLL_BACK: State.ROLLED_BACK,
        Action.RETIRE: State.RETIRED,
    },
    State.SUPERSEDED: {Action.RETIRE: State.RETIRED},
    State.FAILED: {},
    State.ROLLED_BACK: {},
    State.RETIRED: {},
}

# An organ has at most one rollout in these states.
IN_FLIGHT = (State.STAGED, State.VERIFIED, State.WARM, State.SHADOW, State.CANARY)
# A replica holds the candidate in these.
RESIDENT = (State.VERIFIED, State.WARM, State.SHADOW, State.CANARY)
# Requests reach the candidate in these.
WITH_TRAFFIC = (State.SHADOW, State.CANARY)
# What an operator may ask for; the rest is the controller's.
OPERATOR_ACTIONS = (Action.SHADOW, Action.CANARY, Action.PROMOTE, Action.ROLL_BACK)


def next_state(state: State, action: Action, subject: str) -> State:
    """The state after an action.

    Args:
        state: where the rollout stands.
        action: what is asked.
        subject: what the rollout is called in the error, for example "the rollout of 'heart' (heart-12)".

    Raises:
        RolloutStateError: the action is not possible; the text names the state, the action and what is possible.
    """
    try:
        return TRANSITIONS[state][action]
    except KeyError:
        possible = [str(known) for known in OPERATOR_ACTIONS if known in TRANSITIONS[state]]
        hint = _HINTS.get(state, "")
        raise RolloutStateError(
            f"{subject} is {state}, so {action} is not possible; possible: {', '.join(possible) or 'nothing'}{hint}"
        ) from None


_HINTS: Mapping[State, str] = {
    State.STAGED: ", and more once it is warm",
    State.VERIFIED: ", and more once it is warm",
    State.FAILED: "; stage a version again",
    State.ROLLED_BACK: "; stage a version again",
    State.RETIRED: "; stage a version again",
    State.SUPERSEDED: "; stage the version again",
}
