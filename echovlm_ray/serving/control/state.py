"""The state for operators: the live set, the rollouts, and the bundles of every replica."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial

from echovlm_ray.serving.control.changes import Changes
from echovlm_ray.serving.control.gate_messages import gates_to_proto
from echovlm_ray.serving.control.messages import (
    VersionOf,
    expert_set_to_proto,
    problem_to_proto,
    residents_to_proto,
    rollout_to_proto,
)
from protos import control_pb2
from router.rollouts.controller import RolloutController
from router.rollouts.fleet import Fleet
from router.rollouts.fleet_view import FleetObserver
from router.rollouts.organ_problem import organ_problems
from router.rollouts.shadow_reports import report_of
from router.rollouts.states import State
from router.rollouts.store import RolloutStore

LOADING_PERIOD_S = 0.25
IDLE_PERIOD_S = 1.0
# The most attempts to read a consistent state; the last one is returned in any case.
MAX_READS = 3
_LOADING = (State.STAGED, State.VERIFIED)


class StateReader:
    """Reads the database and polls the replicas. Thread-safe; every method may block."""

    def __init__(
        self,
        store: RolloutStore,
        fleet: Fleet,
        version_of: VersionOf,
        status_timeout_s: float,
        controller: RolloutController,
        not_taken_up: Callable[[int], Iterable[str]] = lambda sequence: (),
    ) -> None:
        """
        Args:
            store: the rollouts.
            fleet: the replicas.
            version_of: digest → version.
            status_timeout_s: how long a replica may take to answer.
            controller: has the conditions of rollouts, and the versions that are only loaded for a rollback.
            not_taken_up: `PolicyPropagation.missing`.
        """
        self._store = store
        self._controller = controller
        self._version_of = version_of
        self._not_taken_up = not_taken_up
        self._observer = FleetObserver(fleet, status_timeout_s)
        # The observer polls a replica only once at a time.
        self._lock = threading.Lock()

    def read(self, organ: str | None = None, *, recent_s: float = 0.0) -> control_pb2.ControlState:
        """Reads the state of all organs or of one.

        The replicas are polled after the database is read. Then rollouts are read once more, so that no replica appears
        to load a bundle that is not verified yet.

        Args:
            organ: the organ; None for all organs.
            recent_s: how old the status of replicas of organs without changes may be.
        """
        state = self._read_once(organ, recent_s)
        for _ in range(MAX_READS - 1):
            if self._store.head().count == state.version:
                break
            state = self._read_once(organ, recent_s)
        return state

    def _read_once(self, organ: str | None, recent_s: float) -> control_pb2.ControlState:
        with self._store.read() as transaction:
            snapshot = transaction.snapshot()
            organs = snapshot.known_organs if organ is None else (organ,)
            # The newest one of an organ is the one in flight, if any.
            rollouts = [
                rollout_to_proto(
                    rollout,
                    self._version_of,
                    report_of(transaction.connection, rollout.id),
                    self._controller.waits_for(rollout.id),
                    gates_to_proto(
                        transaction.gate_standing(rollout),
                        self._version_of,
                        partial(self._controller.gates.progress, rollout.id),
                    ),
                )
                for known in organs
                for rollout in transaction.rollouts(organ=known, limit=1)
            ]
        with self._lock:
            views = self._observer.observe(snapshot, organs, recent_s=recent_s)
        return control_pb2.ControlState(
            version=snapshot.sequence,
            live=expert_set_to_proto(snapshot.expert_set()),
            rollouts=rollouts,
            replicas=[
                message for view in views.values() for message in residents_to_proto(view, self._controller.is_spare)
            ],
            not_taken_up=self._not_taken_up(snapshot.sequence),
            problems=[
                problem_to_proto(problem, self._version_of)
                for problem in organ_problems(snapshot, views, self._controller.load_failures())
            ],
        )


class StateWatch:
    """Streams the state to watchers. For one event loop."""

    def __init__(self, reader: StateReader, store: RolloutStore) -> None:
        """Takes the reader, and the source of change notifications."""
        self._reader = reader
        self._changes = Changes()
        self._unsubscribe = store.subscribe(self._changes.announce)

    def stop(self) -> None:
        """Ends the subscription to changes."""
        self._unsubscribe()

    async def watch(self) -> AsyncIterator[control_pb2.ControlState]:
        """Yields the state now and after every change."""
        last: control_pb2.ControlState | None = None
        with self._changes.listener() as changed:
            while True:
                changed.clear()
                state = await asyncio.to_thread(partial(self._reader.read, recent_s=IDLE_PERIOD_S))
                if state != last:
                    last = state
                    yield state
                try:
                    async with asyncio.timeout(LOADING_PERIOD_S if _loads(state) else IDLE_PERIOD_S):
                        await changed.wait()
                except TimeoutError:
                    continue


def _loads(state: control_pb2.ControlState) -> bool:
    return any(rollout.state in _LOADING for rollout in state.rollouts) or any(
        bundle.progress < 1 for replica in state.replicas for bundle in replica.bundles
    )
