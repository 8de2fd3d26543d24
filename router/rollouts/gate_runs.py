"""Evaluates the gates of candidates one after another, while the candidates are loaded."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from router.rollouts.background import Background
from router.rollouts.evaluations import GateStanding
from router.rollouts.fleet_view import OrganView
from router.rollouts.gates import EvaluationInterruptedError, Evaluator, Evidence, GateRun, UnusableGateError
from router.rollouts.outcome import format_error
from router.rollouts.records import Rollout, Snapshot
from router.rollouts.states import State
from router.rollouts.store import RolloutStore

logger = logging.getLogger(__name__)

# States in which a candidate can be evaluated.
EVALUABLE = (State.WARM, State.SHADOW, State.CANARY)
# The delay before an interrupted evaluation begins again.
RETRY_S = 5.0
# An interruption that repeats this often is not temporary.
MAX_TRIES = 5


@dataclass(frozen=True, slots=True)
class _Key:
    """One gate of one rollout."""

    rollout_id: str
    position: int


@dataclass(slots=True)
class _Run:
    """A running evaluation: its cancellation and its progress."""

    cancelled: threading.Event = field(default_factory=threading.Event)
    answered: int = 0
    questions: int = 0

    def advance(self, answered: int, questions: int) -> None:
        self.answered, self.questions = answered, questions


class GateRuns:
    """Evaluations of all rollouts. The database has the results; an unfinished one begins again after a restart."""

    def __init__(
        self,
        store: RolloutStore,
        evaluator: Evaluator | None,
        clock: Callable[[], float],
        fail: Callable[[str, str], None],
        on_done: Callable[[], None],
    ) -> None:
        """
        Args:
            store: the state.
            evaluator: computes the figures; None if gates cannot be declared.
            clock: monotonic, in seconds.
            fail: called with a rollout's id and a reason when it fails.
            on_done: called from its thread when an evaluation has ended.
        """
        self._store = store
        self._evaluator = evaluator
        self._clock = clock
        self._fail = fail
        # One at a time: the limit on questions per second is for the whole system.
        self._calls = Background(1, on_done)
        self._runs: dict[_Key, _Run] = {}
        self._tries: dict[_Key, int] = {}
        self._not_before = 0.0
        self._standings: Mapping[str, GateStanding] = {}

    def step(self, snapshot: Snapshot, views: Mapping[str, OrganView]) -> None:
        """Stores finished results, cancels obsolete evaluations and starts the next one. Does not block."""
        self._take_finished()
        gated = [rollout for rollout in snapshot.in_flight if rollout.plan.gates]
        with self._store.read() as transaction:
            self._standings = {rollout.id: transaction.gate_standing(rollout) for rollout in gated}
        ready = [rollout for rollout in gated if _is_ready(rollout, views)]
        wanted = {_Key(rollout.id, position) for rollout in gated for position in self._standings[rollout.id].open[:1]}
        for key, run in self._runs.items():
            if key not in wanted:
                run.cancelled.set()
        self._tries = {key: tries for key, tries in self._tries.items() if key in wanted}
        if self._evaluator is None or not self._calls.has_capacity() or self._clock() < self._not_before:
            return
        for rollout in ready:
            if open_gates := self._standings[rollout.id].open:
                self._begin(self._evaluator, rollout, open_gates[0], snapshot)
                return

    def standing(self, rollout: Rollout) -> GateStanding:
        """The status of a rollout's gates at the last pass."""
        return self._standings.get(rollout.id, GateStanding(rollout.plan.gates, {}))

    def progress(self, rollout_id: str, position: int) -> tuple[int, int]:
        """(answered, all) questions of an open gate; zeros before it began."""
        run = self._runs.get(_Key(rollout_id, position))
        return (0, 0) if run is None else (run.answered, run.questions)

    def waits_for(self, rollout: Rollout) -> str:
        """What a candidate with gates waits for, as text; "" once it has passed all of them."""
        standing = self.standing(rollout)
        if standing.open:
            position = standing.open[0]
            answered, questions = self.progress(rollout.id, position)
            far = f", {answered} of {questions} questions" if questions else ""
            return f"gate {position + 1} of {len(standing.gates)}, {standing.gates[position].subject}{far}"
        if standing.failed:
            return f"an operator, to roll it back or to override: {standing.figures}"
        return ""

    def stop(self) -> None:
        """Cancels the running evaluation; the next process begins it again."""
        for run in list(self._runs.values()):
            run.cancelled.set()

    def _begin(self, evaluator: Evaluator, rollout: Rollout, position: int, snapshot: Snapshot) -> None:
        live = snapshot.live(rollout.organ)
        key, run = _Key(rollout.id, position), _Run()
        wanted = GateRun(
            gate=rollout.plan.gates[position],
            digest=rollout.digest,
            incumbent_digest=live.stable_digest if live else None,
            cancelled=run.cancelled,
            progress=run.advance,
        )
        self._runs[key] = run
        self._calls.start(key, partial(evaluator.evaluate, wanted))

    def _take_finished(self) -> None:
        for key, future in self._calls.take_done().items():
            assert isinstance(key, _Key)
            run = self._runs.pop(key)
            error = future.exception()
            if error is None:
                self._ended(key, future.result())
            elif run.cancelled.is_set():
                continue
            elif isinstance(error, EvaluationInterruptedError) and self._tries.get(key, 0) + 1 < MAX_TRIES:
                self._tries[key] = self._tries.get(key, 0) + 1
                self._not_before = self._clock() + RETRY_S
                logger.warning("an evaluation of %s begins again: %s", key.rollout_id, format_error(error))
            else:
                if not isinstance(error, UnusableGateError | EvaluationInterruptedError):
                    logger.error("an evaluation of %s failed", key.rollout_id, exc_info=error)
                self._fail(key.rollout_id, f"gate {key.position + 1} cannot be evaluated: {format_error(error)}")

    def _ended(self, key: _Key, evidence: Evidence) -> None:
        with self._store.write() as transaction:
            rollout = transaction.rollout(key.rollout_id)
            # It may have been rolled back or promoted since.
            if rollout.in_flight and key.position in transaction.gate_standing(rollout).open:
                transaction.note_evaluation(rollout, key.position, evidence)


def _is_ready(rollout: Rollout, views: Mapping[str, OrganView]) -> bool:
    view = views.get(rollout.organ)
    return rollout.state in EVALUABLE and view is not None and view.resident_everywhere(rollout.digest)
