"""The controller in a separate process that stops at a named point or dies at a numbered write.

The points are in the fleet and the verifier, and in SQLAlchemy's events: the product has no code for them.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import event

from router.gating.expert_set import ExpertSet
from router.rollouts.database import Database
from router.rollouts.operations import RolloutOperations
from router.rollouts.rollout_file import RolloutFile
from router.rollouts.store import RolloutStore
from tests.router.rollouts.support import QUICK, DigestVerifier, FolderFleet, controller_of

FILE = {"steps": [{"mode": "shadow", "percent": 10, "hold_s": 0}, {"percent": 50, "hold_s": 0}]}


@dataclass(frozen=True)
class Orders:
    """What a child does.

    Attributes:
        stop_at: the point at which it waits to be killed, or "".
        die_at_write: the number of the writing statement before which it kills itself, or 0.
        then_rolls_back: rolls back the candidate once it is stable.
    """

    root: Path
    url: str
    live: ExpertSet
    candidate: str
    stop_at: str = ""
    die_at_write: int = 0
    then_rolls_back: bool = False

    @property
    def marker(self) -> Path:
        return self.root / "reached"


class StoppingFleet(FolderFleet):
    def __init__(self, orders: Orders) -> None:
        super().__init__(orders.root / "fleet")
        self.orders = orders

    def reach(self, point: str) -> None:
        if point == self.orders.stop_at:
            self.orders.marker.touch()
            time.sleep(60)

    def load(self, replica: str, organ: str, digest: str, timeout_s: float) -> None:
        self.reach(f"before load {replica}")
        super().load(replica, organ, digest, timeout_s)
        self.reach(f"after load {replica}")

    def written(self, replica: str) -> None:
        self.reach(f"in load {replica}")

    def unload(self, replica: str, organ: str, digest: str) -> None:
        self.reach(f"before unload {replica}")
        super().unload(replica, organ, digest)
        self.reach(f"after unload {replica}")

    def pinned(self) -> set[str]:
        self.reach("pinned")
        return set()


class StoppingVerifier(DigestVerifier):
    def __init__(self, fleet: StoppingFleet) -> None:
        super().__init__(fleet)
        self.stopping = fleet

    def verify(self, organ: str, digest: str) -> None:
        self.stopping.reach("before verify")
        if self.stopping.orders.stop_at == "verify kills":
            os.kill(os.getpid(), signal.SIGKILL)
        super().verify(organ, digest)
        self.stopping.reach("after verify")


def run(orders: Orders) -> None:
    """What Control does when it starts, and an operator who applies the same file whenever it does."""
    database = Database(orders.url)
    if orders.die_at_write:
        die_at_write(database, orders.die_at_write)
    store = RolloutStore(database)
    store.adopt(orders.live, actor="start")
    fleet = StoppingFleet(orders)
    operations = RolloutOperations(store, fleet, QUICK)
    file = RolloutFile.model_validate({**FILE, "organ": "heart", "digest": orders.candidate})
    rollout = operations.apply(file, lambda organ, version: version, actor="ann").rollout
    assert rollout is not None
    controller = controller_of(store, fleet, verifier=StoppingVerifier(fleet))
    while store.rollout(rollout.id).in_flight:
        controller.reconcile_once()
        time.sleep(0.001)
    if orders.then_rolls_back:
        operations.roll_back_stable("heart", orders.candidate, actor="ann")
    while True:
        controller.reconcile_once()
        stable = store.policy().stable.bundle_digest("heart")
        if not store.snapshot().in_flight and all(held == {stable} for held in fleet.held("heart").values()):
            break
        time.sleep(0.001)
    database.close()


def die_at_write(database: Database, number: int) -> None:
    writes = 0

    @event.listens_for(database.engine, "before_cursor_execute")
    def count(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        nonlocal writes
        if statement.split()[0] in ("INSERT", "UPDATE", "DELETE"):
            writes += 1
            if writes == number:
                os.kill(os.getpid(), signal.SIGKILL)
