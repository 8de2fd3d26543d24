"""Brings rollouts into a state, and checks that an operation changed nothing."""

from collections.abc import Callable

from router.rollouts.operations import RolloutOperations
from router.rollouts.outcome import Outcome
from router.rollouts.states import Action, State
from router.rollouts.store import RolloutStore
from tests.router.rollouts.support import FolderFleet


def to_state(store: RolloutStore, fleet: FolderFleet, rollout_id: str, state: State) -> None:
    """Takes a staged rollout there as the controller does."""
    path = {
        State.STAGED: (),
        State.VERIFIED: (Action.VERIFY,),
        State.WARM: (Action.VERIFY, Action.WARM_UP),
        State.SHADOW: (Action.VERIFY, Action.WARM_UP, Action.SHADOW),
        State.CANARY: (Action.VERIFY, Action.WARM_UP, Action.CANARY),
        State.STABLE: (Action.VERIFY, Action.WARM_UP),
        State.FAILED: (Action.FAIL,),
        State.ROLLED_BACK: (Action.ROLL_BACK,),
    }[state]
    with store.write() as transaction:
        rollout = transaction.rollout(rollout_id)
        for action in path:
            percent = 5.0 if action in (Action.SHADOW, Action.CANARY) else None
            rollout = transaction.move(rollout, action, actor="controller", percent=percent, reason="because")
        if state == State.STABLE:
            transaction.promote(rollout, actor="controller", max_previous=3)
    for replica in fleet.replicas(rollout.organ):
        fleet.load(replica, rollout.organ, rollout.digest, 1)


def staged(
    operations: RolloutOperations,
    store: RolloutStore,
    fleet: FolderFleet,
    name: str,
    state: State,
    organ: str = "heart",
) -> str:
    outcome = operations.stage(organ, fleet.push(name), actor="ann")
    assert outcome.rollout is not None
    to_state(store, fleet, outcome.rollout.id, state)
    return outcome.rollout.digest


def unchanged(store: RolloutStore, ask: Callable[[], Outcome]) -> Outcome:
    """The answer to something that must touch nothing."""
    before = store.head(), store.snapshot(), store.rollouts()
    outcome = ask()
    assert (store.head(), store.snapshot(), store.rollouts()) == before
    return outcome
