"""A store, a fleet of folders in which something can go wrong, and a controller over both."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from router.rollouts.controller import RolloutController
from router.rollouts.fleet import ReplicaLostError, ReplicaResidents
from router.rollouts.health import HealthMonitor
from router.rollouts.operations import RolloutOperations
from router.rollouts.records import Rollout
from router.rollouts.settings import RolloutPlan
from router.rollouts.states import State
from router.rollouts.store import RolloutStore
from tests.router.rollouts.support import (
    Clock,
    FolderFleet,
    reconcile_until,
)


class TroubledFleet(FolderFleet):
    """A folder fleet in which something can go wrong, or take long, at will."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.before_load: Callable[[str, str], None] = lambda replica, key: None
        self.before_unload: Callable[[str, str], None] = lambda replica, key: None
        self.silent: set[str] = set()

    def load(self, replica: str, organ: str, digest: str, timeout_s: float) -> None:
        self.before_load(replica, digest)
        super().load(replica, organ, digest, timeout_s)

    def unload(self, replica: str, organ: str, digest: str) -> None:
        self.before_unload(replica, digest)
        super().unload(replica, organ, digest)

    def resident(self, replica: str, organ: str) -> ReplicaResidents:
        if replica in self.silent:
            raise ReplicaLostError(f"{replica} does not answer")
        return super().resident(replica, organ)


def waiting_for(proceed: threading.Event) -> Callable[[str, str], None]:
    def wait(replica: str, key: str) -> None:
        proceed.wait(10)

    return wait


@dataclass
class World:
    """Two organs with two replicas each; `heart` has the bundle v1."""

    store: RolloutStore
    fleet: TroubledFleet
    monitor: HealthMonitor
    controller: RolloutController
    operations: RolloutOperations
    clock: Clock
    v1: str

    def stage(self, name: str = "v2", organ: str = "heart", plan: RolloutPlan | None = None, size: int = 100) -> str:
        key = self.fleet.push(name, size)
        self.operations.stage(organ, key, actor="ann", plan=plan or RolloutPlan())
        return key

    def rollout(self, organ: str = "heart") -> Rollout:
        return self.store.rollouts(organ, limit=1)[0]

    def reach(self, state: State, organ: str = "heart") -> Rollout:
        reconcile_until(self.controller, lambda _: self.rollout(organ).state == state)
        return self.rollout(organ)

    def reach_held(self, *keys: str, organ: str = "heart") -> None:
        reconcile_until(self.controller, lambda _: all(held == set(keys) for held in self.fleet.held(organ).values()))

    def stable(self, organ: str = "heart") -> str:
        return self.store.policy().stable.bundle_digest(organ)
