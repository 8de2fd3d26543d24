"""`kill -9` of the controller's process at every stage, and before every write to the database."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from router.rollouts.database import Database
from router.rollouts.records import Rollout
from router.rollouts.states import TRANSITIONS, Action, State
from router.rollouts.store import RolloutStore
from tests.router.rollouts.crash_child import Orders, run
from tests.router.rollouts.support import FolderFleet, set_of

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.router.rollouts.crash_child"])
TIMEOUT_S = 30


@pytest.fixture
def make_orders(make_url: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Orders]:
    def make() -> Orders:
        root = tmp_path_factory.mktemp("crash")
        fleet = FolderFleet(root / "fleet")
        old, new = fleet.push("old"), fleet.push("new")
        for replica in ("heart-1", "heart-2"):
            fleet.add_replica("heart", replica, old)
        live = set_of(heart="", liver="")
        heart = live.members[0].model_copy(update={"bundle_digest": old})
        return Orders(root, make_url(), live.model_copy(update={"members": (heart, live.members[1])}), new)

    return make


def start(orders: Orders) -> BaseProcess:
    process = PROCESSES.Process(target=run, args=(orders,), daemon=True)
    process.start()
    return process


def run_until_stopped(orders: Orders) -> None:
    process = start(orders)
    deadline = time.monotonic() + TIMEOUT_S
    while not orders.marker.exists():
        assert process.is_alive(), f"it never came to {orders.stop_at!r}"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    orders.marker.unlink()


def run_to_the_end(orders: Orders) -> None:
    assert exit_code(orders) == 0


def exit_code(orders: Orders) -> int | None:
    process = start(orders)
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
        pytest.fail("it did not end")
    return process.exitcode


def check_nothing_is_half_done(orders: Orders) -> list[Rollout]:
    """What must hold whenever the process is dead."""
    database = Database(orders.url)
    store = RolloutStore(database)
    verification = store.verify_history()
    assert verification.intact, verification.problem
    rollouts = store.rollouts("heart")
    if verification.head.count:
        stable = store.policy().stable.bundle_digest("heart")
        live = [rollout.digest for rollout in rollouts if rollout.state == State.STABLE]
        assert live in ([stable], [])
        assert stable in (orders.candidate, orders.live.bundle_digest("heart"))
        assert live or stable == orders.live.bundle_digest("heart")
    # Every rollout's state is what its entries led to, step by step.
    reached: dict[str, State] = {}
    for entry in store.history():
        if entry.rollout_id and entry.action != Action.STAGE:
            assert reached[entry.rollout_id] == entry.from_state
            assert TRANSITIONS[State(entry.from_state)][Action(entry.action)] == entry.to_state
        if entry.rollout_id:
            reached[entry.rollout_id] = State(entry.to_state)
    assert reached == {rollout.id: rollout.state for rollout in rollouts}
    database.close()
    return rollouts


def check_ended(orders: Orders, state: State) -> Rollout:
    newest = check_nothing_is_half_done(orders)[-1]
    assert newest.state == state
    stable = orders.candidate if state == State.STABLE else orders.live.bundle_digest("heart")
    fleet = FolderFleet(orders.root / "fleet")
    assert fleet.held("heart") == {"heart-1": {stable}, "heart-2": {stable}}
    return newest


POINTS = [
    "before verify",
    "after verify",
    "before load heart-1",
    "in load heart-1",
    "after load heart-1",
    "before load heart-2",
    "in load heart-2",
    "after load heart-2",
    "pinned",
    "before unload heart-1",
    "after unload heart-1",
    "after unload heart-2",
]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_stage_it_goes_on_to_the_end(make_orders: Callable[[], Orders], point: str) -> None:
    orders = make_orders()
    run_until_stopped(replace(orders, stop_at=point))
    check_nothing_is_half_done(orders)
    run_to_the_end(orders)
    check_ended(orders, State.STABLE)
    # Started again, it has nothing to do.
    database = Database(orders.url)
    head = RolloutStore(database).head()
    run_to_the_end(orders)
    assert RolloutStore(database).head() == head
    database.close()


def test_killed_at_every_stage_in_turn_of_one_rollout(make_orders: Callable[[], Orders]) -> None:
    orders = make_orders()
    for point in (
        "after verify",
        "before load heart-1",
        "in load heart-1",
        "before load heart-2",
        "in load heart-2",
        "pinned",
        "before unload heart-1",
    ):
        run_until_stopped(replace(orders, stop_at=point))
        check_nothing_is_half_done(orders)
    run_to_the_end(orders)
    check_ended(orders, State.STABLE)


def test_killed_before_every_write_it_goes_on_to_the_end(make_orders: Callable[[], Orders], tmp_path: Path) -> None:
    """Every write of adopting, staging, six moves and a promotion, each in a database of its own."""
    step = 1 if "sqlite" in make_orders().url else 5
    number, killed = 1, 0
    while True:
        orders = make_orders()
        code = exit_code(replace(orders, die_at_write=number))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
        check_nothing_is_half_done(orders)
        run_to_the_end(orders)
        check_ended(orders, State.STABLE)
        number += step
    assert killed >= 25 / step


def test_killed_in_a_rollback_of_the_stable_version_it_goes_on_to_the_end(make_orders: Callable[[], Orders]) -> None:
    for point in ("before verify", "in load heart-2"):
        orders = replace(make_orders(), then_rolls_back=True)
        run_to_the_end(replace(orders, then_rolls_back=False))
        run_until_stopped(replace(orders, stop_at=point))
        check_nothing_is_half_done(orders)
        run_to_the_end(orders)
        rollouts = check_nothing_is_half_done(orders)
        assert [(rollout.state, rollout.restores) for rollout in rollouts] == [
            (State.STABLE, True),
            (State.ROLLED_BACK, False),
        ]


def test_a_damaged_candidate_fails_wherever_the_process_is_killed(make_orders: Callable[[], Orders]) -> None:
    for number in (5, 9, 10, 11, 12, 13):
        orders = make_orders()
        (orders.root / "fleet" / "registry" / orders.candidate).write_bytes(b"damaged")
        exit_code(replace(orders, die_at_write=number))
        check_nothing_is_half_done(orders)
        run_to_the_end(orders)
        assert "not what its digest says" in check_ended(orders, State.FAILED).reason


def test_a_bundle_that_kills_its_verifier_is_given_up(make_orders: Callable[[], Orders]) -> None:
    orders = make_orders()
    deadly = replace(orders, stop_at="verify kills")
    for _ in range(3):
        assert exit_code(deadly) == -signal.SIGKILL
        check_nothing_is_half_done(orders)
    assert exit_code(deadly) == 0
    assert "died of it 3 times" in check_ended(orders, State.FAILED).reason
