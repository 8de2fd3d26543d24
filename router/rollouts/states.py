"""The states of a rollout and the table of their transitions."""

from collections.abc import Mapping
from enum import StrEnum

from router.errors import RolloutStateError


class State(StrEnum):
    """The state of a rollout."""

    # Staged, but not verified yet.
    STAGED = "staged"
    # Verified; it is being loaded.
    VERIFIED = "verified"
    # Loaded on every replica; no request uses it.
    WARM = "warm"
    # It computes a share of the requests in addition; its answers are discarded.
    SHADOW = "shadow"
    # It answers a share of the requests.
    CANARY = "canary"
    # The organ's version for all requests.
    STABLE = "stable"
    # It was stable until another version replaced it.
    SUPERSEDED = "superseded"
    # It could not be used; the rollout has the reason.
    FAILED = "failed"
    # It was rolled back by an operator or because of its thresholds.
    ROLLED_BACK = "rolled_back"
    # It was stable, and then it or its organ was retired.
    RETIRED = "retired"


class Action(StrEnum):
    """The actions of the history: those that move a rollout, and those without one."""

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
    # Moves nothing: a stable version fails after its promotion, and there is no previous version.
    FAILING = "failing"
    # Move nothing: gates are added, and a gate is evaluated.
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

# (state, action) → next state. Other combinations are refused.
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
# The operators' actions; the others are the controller's.
OPERATOR_ACTIONS = (Action.SHADOW, Action.CANARY, Action.PROMOTE, Action.ROLL_BACK)


def next_state(state: State, action: Action, subject: str) -> State:
    """The state after an action.

    Args:
        state: the current state.
        action: the requested action.
        subject: the rollout's name in the error, for example "the rollout of 'heart' (heart-12)".

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
