import pytest

from router.errors import RolloutStateError
from router.rollouts.states import IN_FLIGHT, OPERATOR_ACTIONS, TRANSITIONS, Action, State, next_state


def test_every_state_is_in_the_table_and_can_be_reached() -> None:
    assert set(TRANSITIONS) == set(State)
    reached = {State.STAGED}
    while True:
        more = reached | {target for state in reached for target in TRANSITIONS[state].values()}
        if more == reached:
            break
        reached = more
    assert reached == set(State)


def test_every_flight_can_be_failed_and_rolled_back_and_the_rest_cannot_fail() -> None:
    for state in State:
        assert (Action.FAIL in TRANSITIONS[state]) == (state in IN_FLIGHT)
    assert all(Action.ROLL_BACK in TRANSITIONS[state] for state in IN_FLIGHT)


def test_traffic_needs_a_warm_candidate() -> None:
    for state in (State.STAGED, State.VERIFIED):
        assert not {Action.CANARY, Action.SHADOW, Action.PROMOTE} & set(TRANSITIONS[state])


def test_only_what_was_warm_becomes_stable() -> None:
    sources = {state for state, actions in TRANSITIONS.items() if State.STABLE in actions.values()}
    assert sources == {State.WARM, State.SHADOW, State.CANARY}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("action", OPERATOR_ACTIONS)
def test_a_wrong_transition_names_the_state_what_was_asked_and_what_is_possible(state: State, action: Action) -> None:
    if action in TRANSITIONS[state]:
        assert next_state(state, action, "the rollout") == TRANSITIONS[state][action]
        return
    with pytest.raises(RolloutStateError) as raised:
        next_state(state, action, "the rollout of 'heart'")
    text = str(raised.value)
    assert text.startswith(f"the rollout of 'heart' is {state}, so {action} is not possible; possible: ")
    possible = text.split("possible: ")[1]
    for other in OPERATOR_ACTIONS:
        assert (other in possible) == (other in TRANSITIONS[state])
