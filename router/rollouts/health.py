"""The observations that Routers report of each bundle, kept for as long as they may be needed."""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from router.rollouts.latency import LatencyHistogram

# Reports that come within so many seconds are kept as one.
SLICE_S = 1.0
# Bounds on what is kept: slices per bundle, bundles, and how long.
MAX_SLICES = 2048
MAX_BUNDLES = 1_000
MAX_AGE_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Observation:
    """What a Router saw of one organ's bundle since its last report. Numbers only: nothing of any request.

    Attributes:
        organ: the organ.
        digest: the bundle.
        requests: requests that ended and used it, failed ones included; in shadow, the shadow's.
        errors: those of them that failed because of this organ's experts.
        nonfinite: those of them in which its experts gave infinite values or none.
        latency: seconds per token, one for each request that did not fail.
    """

    organ: str
    digest: str
    requests: int = 0
    errors: int = 0
    nonfinite: int = 0
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)

    def merged(self, other: "Observation") -> "Observation":
        """This one and another of the same bundle together."""
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
    """What was reported of a bundle within `SLICE_S` seconds from `start`, in seconds of the monitor's clock."""

    start: float
    seen: Observation


class HealthMonitor:
    """Collects reports. Kept in memory: after a restart the window fills again. Safe to use from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Takes a clock in seconds that is never set."""
        self.clock = clock
        self._lock = threading.Lock()
        self._slices: dict[tuple[str, str], deque[Slice]] = {}

    def record(self, observation: Observation) -> None:
        """Adds a report."""
        now = self.clock()
        key = (observation.organ, observation.digest)
        with self._lock:
            # Taken out and put back: the first one is the one that was silent for longest.
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
        """What was reported of a bundle in slices that began at a time or later, in order."""
        with self._lock:
            return [each for each in self._slices.get((organ, digest), ()) if each.start >= since]

    def observed(self, organ: str, digest: str, since: float) -> Observation:
        """The same, together."""
        return total(organ, digest, self.slices(organ, digest, since))


def total(organ: str, digest: str, slices: Iterable[Slice]) -> Observation:
    """What slices of one bundle hold together."""
    requests = errors = nonfinite = 0
    times: Counter[int] = Counter()
    for each in slices:
        requests += each.seen.requests
        errors += each.seen.errors
        nonfinite += each.seen.nonfinite
        times.update(each.seen.latency.counts)
    return Observation(organ, digest, requests, errors, nonfinite, LatencyHistogram(dict(times)))
