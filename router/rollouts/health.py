"""The observations that Routers report for each bundle, in a sliding window."""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from router.rollouts.latency import LatencyHistogram

# Reports within this many seconds are merged into one slice.
SLICE_S = 1.0
# Limits: slices per bundle, bundles, and age.
MAX_SLICES = 2048
MAX_BUNDLES = 1_000
MAX_AGE_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Observation:
    """What a Router observed of one organ's bundle since its last report. Numbers only, no contents of requests.

    Attributes:
        organ: the organ.
        digest: the bundle.
        requests: finished requests that used it, failed ones included; in shadow mode the shadows.
        errors: those that failed because of this organ's experts.
        nonfinite: those in which its experts returned infinity or NaN.
        latency: seconds per token of each request that did not fail.
    """

    organ: str
    digest: str
    requests: int = 0
    errors: int = 0
    nonfinite: int = 0
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)

    def merged(self, other: "Observation") -> "Observation":
        """The sum of this and another observation of the same bundle."""
        return Observation(
            self.organ,
            self.digest,
            self.requests + other.requests,
            self.errors + other.errors,
            self.nonfinite + other.nonfinite,
            self.latency.merged(other.latency),
        )

    @property
    def successes(self) -> int:
        """Requests that did not fail."""
        return self.requests - self.errors


@dataclass(frozen=True, slots=True)
class Slice:
    """The observations of a bundle within `SLICE_S` seconds from `start`, by the monitor's clock."""

    start: float
    seen: Observation


class HealthMonitor:
    """Collects reports in memory: after a restart the window is empty. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` must be monotonic, in seconds."""
        self.clock = clock
        self._lock = threading.Lock()
        self._slices: dict[tuple[str, str], deque[Slice]] = {}

    def record(self, observation: Observation) -> None:
        """Adds a report."""
        now = self.clock()
        key = (observation.organ, observation.digest)
        with self._lock:
            # Moved to the end, so that the first one is the least recently reported.
            slices = self._slices.pop(key, None)
            slices = deque(maxlen=MAX_SLICES) if slices is None else slices
            if slices and now - slices[-1].start < SLICE_S:
                last = slices.pop()
                slices.append(Slice(last.start, last.seen.merged(observation)))
            else:
                slices.append(Slice(now, observation))
            while now - slices[0].start > MAX_AGE_S:
                slices.popleft()
            self._slices[key] = slices
            while len(self._slices) > MAX_BUNDLES:
                del self._slices[next(iter(self._slices))]

    def slices(self, organ: str, digest: str, since: float = -math.inf) -> list[Slice]:
        """The slices of a bundle that began at or after a time, in order."""
        with self._lock:
            return [each for each in self._slices.get((organ, digest), ()) if each.start >= since]

    def observed(self, organ: str, digest: str, since: float) -> Observation:
        """The sum of those slices."""
        return total(organ, digest, self.slices(organ, digest, since))


def total(organ: str, digest: str, slices: Iterable[Slice]) -> Observation:
    """The sum of slices of one bundle."""
    requests = errors = nonfinite = 0
    times: Counter[int] = Counter()
    for each in slices:
        requests += each.seen.requests
        errors += each.seen.errors
        nonfinite += each.seen.nonfinite
        times.update(each.seen.latency.counts)
    return Observation(organ, digest, requests, errors, nonfinite, LatencyHistogram(dict(times)))
