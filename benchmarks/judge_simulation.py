"""Rollouts without a system: the real controller, store and judge, over simulated traffic and a clock that is moved."""

import itertools
import random
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from router.gating.expert_set import ExpertSet, ExpertSetMember
from router.rollouts.controller import RolloutController
from router.rollouts.database import Database
from router.rollouts.fleet import ReplicaResidents
from router.rollouts.health import HealthMonitor, Observation
from router.rollouts.latency import LatencyHistogram
from router.rollouts.operations import RolloutOperations
from router.rollouts.records import Rollout, Snapshot
from router.rollouts.settings import RolloutPlan, RolloutSettings
from router.rollouts.states import State
from router.rollouts.store import Clock, RolloutStore
from router.rollouts.traffic import TrafficPolicy, assign
from router.rollouts.transaction import Transaction

ORGAN, OTHER = "heart", "liver"
INCUMBENT, CANDIDATE, NEIGHBOUR = "1" * 64, "2" * 64, "3" * 64
# The length of the incumbent's statistics before the rollout, in seconds.
BEFORE_S = 120
# Real time that a thread of the controller may take.
TIMEOUT_S = 30.0
ENDED = (State.FAILED, State.ROLLED_BACK)


@dataclass(frozen=True)
class Traffic:
    """What requests come, and how they end.

    Attributes:
        rate: requests to the organ a second, on average; they come independently.
        usual: the part of the incumbent's requests that fails.
        candidate: the part of the candidate's requests that fails.
        outages: (from, to, part that fails), in seconds since the rollout began: both versions, and the other organ.
        spread: standard deviation of the logarithm of a request's time per token.
        slowness: the candidate's time per token over the incumbent's.
    """

    rate: float
    usual: float
    candidate: float
    outages: tuple[tuple[float, float, float], ...] = ()
    spread: float = 0.4
    slowness: float = 1.0

    def failure(self, digest: str, now: float) -> float:
        """The probability that a request fails."""
        own = self.candidate if digest == CANDIDATE else self.usual
        return max([own, *(part for start, end, part in self.outages if start <= now < end)])


@dataclass
class Outcome:
    """How a rollout went.

    Attributes:
        state: of the candidate at the end.
        reason: why.
        requests: that used the candidate.
        seconds: simulated, from staging to the end.
        was_stable: whether it was promoted before.
    """

    state: State
    reason: str
    requests: int
    seconds: float
    was_stable: bool


class ReadOnceStore(RolloutStore):
    """Reads the database only after it was written: most simulated seconds change nothing."""

    def __init__(self, database: Database, clock: Clock) -> None:
        super().__init__(database, clock=clock)
        self._snapshot: Snapshot | None = None
        self.writes = 0

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """Forgets what was read."""
        with super().write() as transaction:
            yield transaction
            self._snapshot = None
            self.writes += 1

    def snapshot(self) -> Snapshot:
        """The state, as it was read last."""
        if self._snapshot is None:
            self._snapshot = super().snapshot()
        return self._snapshot


class MemoryFleet:
    """One replica of each organ, which loads immediately."""

    def __init__(self) -> None:
        self.held = {ORGAN: {INCUMBENT}, OTHER: {NEIGHBOUR}}

    def replicas(self, organ: str) -> Sequence[str]:
        """The organ's only one."""
        return [organ]

    def resident(self, replica: str, organ: str) -> ReplicaResidents:
        """The resident bundles."""
        return ReplicaResidents(dict.fromkeys(self.held[organ], 1), 10)

    def load(self, replica: str, organ: str, digest: str, timeout_s: float) -> None:
        """Loads."""
        self.held[organ] = self.held[organ] | {digest}

    def unload(self, replica: str, organ: str, digest: str) -> None:
        """Unloads."""
        self.held[organ] = self.held[organ] - {digest}

    def load_bytes(self, organ: str, digest: str) -> int:
        """All are of one size."""
        return 1

    def pinned(self) -> Collection[str]:
        """Requests end within their second."""
        return ()

    def verify(self, organ: str, digest: str) -> None:
        """All are sound."""


@dataclass
class Simulation:
    """One organ's rollout, second by second."""

    traffic: Traffic
    random: random.Random
    store: ReadOnceStore
    controller: RolloutController
    operations: RolloutOperations
    monitor: HealthMonitor
    now: list[float]
    began: float = 0.0
    requests: int = 0
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def run(self, plan: RolloutPlan, limit_s: int, max_requests: int | None = None) -> Outcome:
        """Stages the candidate and advances the time until its rollout has ended, or to a limit.

        Args:
            plan: its steps.
            limit_s: simulated seconds.
            max_requests: no further than so many requests of the candidate.
        """
        for _ in range(BEFORE_S):
            self._second()
        self.operations.stage(ORGAN, CANDIDATE, actor="simulation", plan=plan)
        self._settle()
        self.began = self.now[0]
        was_stable, writes, ended = False, -1, False
        for _ in range(limit_s):
            self._second()
            self.controller.reconcile_once(recent_s=TIMEOUT_S)
            if self.store.writes != writes:
                writes, rollout = self.store.writes, self._rollout()
                was_stable = was_stable or rollout.state == State.STABLE
                ended = rollout.state in ENDED or (was_stable and not rollout.watching)
            if ended or (max_requests is not None and self.requests >= max_requests):
                break
        newest = self.store.rollouts(ORGAN, limit=1)[0]
        state = State.ROLLED_BACK if newest.restores else newest.state
        return Outcome(state, newest.reason, self.requests, self.now[0] - self.began, was_stable)

    def _rollout(self) -> Rollout:
        return next(each for each in self.store.rollouts(ORGAN) if each.digest == CANDIDATE)

    def _settle(self) -> None:
        """The candidate is verified and loaded on threads, in real time."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._rollout().mode is None and self._rollout().state != State.WARM:
            self.controller.reconcile_once()
            assert time.monotonic() < deadline

    def _second(self) -> None:
        self.now[0] += 1.0
        policy = TrafficPolicy.of(self.store.snapshot())
        seen: dict[str, list[bool]] = {}
        for _ in range(self._poisson(self.traffic.rate)):
            assignment = assign(policy, [ORGAN], request_id=f"{self.random.random()}-{next(self.numbers)}")
            sets = [assignment.expert_set, *([assignment.shadow_set] if assignment.shadow_set else [])]
            for digest in {each.bundle_digest(ORGAN) for each in sets}:
                seen.setdefault(digest, []).append(self._fails(digest))
        for digest, failed in seen.items():
            self.monitor.record(self._observation(ORGAN, digest, failed))
        self.requests += len(seen.get(CANDIDATE, ()))
        elsewhere = [self._fails(NEIGHBOUR) for _ in range(self._poisson(self.traffic.rate))]
        if elsewhere:
            self.monitor.record(self._observation(OTHER, NEIGHBOUR, elsewhere))

    def _fails(self, digest: str) -> bool:
        return self.random.random() < self.traffic.failure(digest, self.now[0] - self.began if self.began else -1.0)

    def _observation(self, organ: str, digest: str, failed: list[bool]) -> Observation:
        median = 0.03 * (self.traffic.slowness if digest == CANDIDATE else 1.0)
        times = [median * self.random.lognormvariate(0.0, self.traffic.spread) for each in failed if not each]
        return Observation(organ, digest, len(failed), sum(failed), 0, LatencyHistogram.of(times))

    def _poisson(self, mean: float) -> int:
        """How many come in a second, if they come independently."""
        count, waited = 0, self.random.expovariate(mean)
        while waited < 1.0:
            count += 1
            waited += self.random.expovariate(mean)
        return count


@contextmanager
def simulation(traffic: Traffic, seed: int, settings: RolloutSettings) -> Iterator[Simulation]:
    """A system of two organs; the candidate is the first one's."""
    now = [1000.0]
    with TemporaryDirectory(prefix="judge-") as directory:
        database = Database(f"sqlite:///{Path(directory) / 'rollouts.db'}")
        store = ReadOnceStore(database, lambda: 1.8e9 + now[0])
        members = (
            ExpertSetMember(organ=ORGAN, bundle_digest=INCUMBENT),
            ExpertSetMember(organ=OTHER, bundle_digest=NEIGHBOUR),
        )
        store.adopt(ExpertSet(backbone_digest="f" * 64, routing="organs", members=members), actor="simulation")
        fleet = MemoryFleet()
        monitor = HealthMonitor(lambda: now[0])
        controller = RolloutController(store, fleet, fleet, settings, monitor)
        operations = RolloutOperations(store, fleet, settings)
        try:
            yield Simulation(traffic, random.Random(seed), store, controller, operations, monitor, now)
        finally:
            database.close()
