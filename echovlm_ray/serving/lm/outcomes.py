"""What became of the runs, by organ and version: kept until Control has it. Numbers only, nothing of any request.

What counts as an error of an organ's experts:

- They answered that they cannot compute (`ExpertsFailedError`): theirs, whichever other organs the request used.
- The logits were infinite or not a number: the request's candidates did it, for the incumbents served all the others;
  without a candidate, every organ that it used is named.
- They could not be reached (`ExpertsUnavailableError`): a dead replica takes every version with it, and says nothing
  of one of them. It counts only where another version of the organ went on while the request was kept waiting, so
  that this one alone was missing; not while it waited for a place, or a caller's short deadline could bring it about.
- No replica could load them (`ExpertsUnusableError`): that version's, and no other's.

A deadline, a full queue or a caller who left is no version's error, but how long each token took counts all the same.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from echovlm_ray.engine.sampler import NonFiniteLogitsError
from echovlm_ray.serving.cluster.metrics import RequestKind, RouterMetrics
from echovlm_ray.serving.lm.admission import UsedBundle
from protos import control_pb2
from router.errors import ExpertsFailedError, ExpertsUnavailableError, ExpertsUnusableError
from router.rollouts.shadow import ShadowRecord

logger = logging.getLogger(__name__)

# About ten minutes of a hundred requests a second.
MAX_WAITING = 60_000
# What one report brings at most.
MAX_REPORTED = 5_000
MAX_BUNDLES = 1_000
# A version is missing alone when another one of its organ still made tokens so long after its own last one; every
# version is asked for again several times within it.
ALONE_S = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run says of one organ's version.

    Attributes:
        tokens: that it helped to make.
        seconds_per_token: between the tokens; none of a run that failed or made a single one.
    """

    organ: str
    digest: str
    error: bool = False
    nonfinite: bool = False
    tokens: int = 0
    seconds_per_token: float | None = None


class Outcomes:
    """Waits for Control; over the bound the oldest are lost, and the log says how many. Safe from several threads."""

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        """`max_waiting` bounds the outcomes and the shadows' comparisons, each."""
        self._max_waiting = max_waiting
        self.metrics = RouterMetrics()
        self._lock = threading.Lock()
        self._runs: deque[Outcome] = deque()
        self._shadows: deque[control_pb2.ShadowObservation] = deque()
        self._lost = 0
        # Organ → digest → when it last helped to make a token.
        self._progress: dict[str, dict[str, float]] = {}

    def __len__(self) -> int:
        return len(self._runs) + len(self._shadows)

    def note_token(self, used: Sequence[UsedBundle], now: float) -> None:
        """Notes that these versions computed, in `time.monotonic` seconds."""
        for bundle in used:
            versions = self._progress.setdefault(bundle.organ, {})
            versions[bundle.digest] = now
            if len(versions) > MAX_BUNDLES:
                del versions[min(versions, key=lambda digest: versions[digest])]

    def record(
        self,
        used: Sequence[UsedBundle],
        error: Exception | None,
        *,
        tokens: int,
        seconds_per_token: float | None,
        last_progress: float,
        complete: bool = True,
    ) -> None:
        """Adds what a run says of the versions that it used, or of those that its rollout is about.

        Args:
            used: the versions.
            error: what ended it, if it did not end well.
            tokens: that it made.
            seconds_per_token: between them, if it was measured.
            last_progress: when its experts last computed for it, or when it came.
            complete: whether it made its last token.
        """
        blamed = isinstance(error, ExpertsFailedError | ExpertsUnavailableError | NonFiniteLogitsError)
        if not blamed and (not tokens or (tokens == 1 and not complete)):
            # It never reached its experts, or was cut short before anything could be said of their speed: where every
            # answer takes too long, none of them is a success.
            return
        nonfinite = isinstance(error, NonFiniteLogitsError)
        suspects = [bundle for bundle in used if bundle.rollout is not None] or used
        for bundle in used:
            is_nonfinite = nonfinite and bundle in suspects
            failed = is_nonfinite or self._is_error_of(bundle, error, last_progress)
            if (
                not failed
                and isinstance(error, ExpertsFailedError | ExpertsUnavailableError)
                and (not tokens or error.organ == bundle.organ)
            ):
                # Neither its fault nor a success.
                continue
            spoilt = failed or nonfinite or isinstance(error, ExpertsFailedError)
            seconds = None if spoilt else seconds_per_token
            kind: RequestKind = "nonfinite" if is_nonfinite else "error" if failed else "ok"
            self.metrics.request(bundle.organ, bundle.version, tokens=tokens, seconds_per_token=seconds, kind=kind)
            self._keep([Outcome(bundle.organ, bundle.digest, failed, is_nonfinite, tokens, seconds)], [])

    def record_shadow(self, rollout_ids: Iterable[str], record: ShadowRecord) -> None:
        """Adds a comparison, for each of the rollouts whose candidates took part in it."""
        observations = [
            control_pb2.ShadowObservation(
                rollout_id=rollout_id,
                tokens=record.tokens,
                shared_tokens=record.shared_tokens,
                first_divergence=record.first_divergence,
                latency_ratio=record.latency_ratio,
            )
            for rollout_id in rollout_ids
        ]
        self._keep([], observations)

    def take(self) -> tuple[list[Outcome], list[control_pb2.ShadowObservation]]:
        """Takes out the oldest, as many as one report brings."""
        with self._lock:
            runs = [self._runs.popleft() for _ in range(min(MAX_REPORTED, len(self._runs)))]
            shadows = [self._shadows.popleft() for _ in range(min(MAX_REPORTED, len(self._shadows)))]
            lost, self._lost = self._lost, 0
        if lost:
            logger.warning("%d outcomes of requests were lost, because Control was away for too long", lost)
        return runs, shadows

    def give_back(self, runs: Sequence[Outcome], shadows: Sequence[control_pb2.ShadowObservation]) -> None:
        """Puts back what could not be reported."""
        with self._lock:
            self._runs.extendleft(reversed(runs))
            self._shadows.extendleft(reversed(shadows))
            self._bound()

    def _keep(self, runs: Sequence[Outcome], shadows: Sequence[control_pb2.ShadowObservation]) -> None:
        with self._lock:
            self._runs.extend(runs)
            self._shadows.extend(shadows)
            self._bound()

    def _bound(self) -> None:
        for waiting in (self._runs, self._shadows):
            while len(waiting) > self._max_waiting:
                waiting.popleft()
                self._lost += 1

    def _is_error_of(self, bundle: UsedBundle, error: Exception | None, last_progress: float) -> bool:
        if isinstance(error, ExpertsFailedError):
            return error.organ == bundle.organ
        if isinstance(error, ExpertsUnusableError):
            return error.digest == bundle.digest
        if isinstance(error, ExpertsUnavailableError) and error.organ == bundle.organ:
            versions = self._progress.get(bundle.organ, {})
            others = [at for digest, at in list(versions.items()) if digest != bundle.digest]
            return max(others, default=-1.0) > max(last_progress, error.since) + ALONE_S
        return False


def report_of(
    router: str, runs: Iterable[Outcome], shadows: Iterable[control_pb2.ShadowObservation]
) -> control_pb2.ReportRequest:
    """The message that brings outcomes to Control, added up by organ and version."""
    observations: dict[tuple[str, str], control_pb2.Observation] = {}
    for run in runs:
        key = (run.organ, run.digest)
        if key not in observations:
            observations[key] = control_pb2.Observation(organ=run.organ, digest=run.digest)
        observation = observations[key]
        observation.requests += 1
        observation.errors += run.error
        observation.nonfinite += run.nonfinite
        observation.tokens += run.tokens
        if run.seconds_per_token is not None:
            observation.seconds_per_token.append(run.seconds_per_token)
    return control_pb2.ReportRequest(router=router, observations=observations.values(), shadows=shadows)


def seconds_per_token(first_at: float, last_at: float, tokens: int) -> float | None:
    """The mean time between tokens; none where there is only one. The first one waits for the prompt."""
    return (last_at - first_at) / (tokens - 1) if tokens > 1 else None
