"""What Routers observe of each bundle, and when a candidate must go back."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from router.rollouts.latency import LatencyHistogram
from router.rollouts.settings import Thresholds

# Bounds on what is kept: reports per bundle, bundles, and how long.
MAX_REPORTS = 10_000
MAX_BUNDLES = 1_000
MAX_AGE_S = 3600.0


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
    def error_rate(self) -> float:
        """Failed requests over all; 0 where there were none."""
        return self.errors / self.requests if self.requests else 0.0


class HealthMonitor:
    """Collects reports. Kept in memory: after a restart the window fills again. Safe to use from several threads."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Takes a clock in seconds since 1970, the store's."""
        self._clock = clock
        self._lock = threading.Lock()
        self._reports: dict[tuple[str, str], deque[tuple[float, Observation]]] = {}

    def record(self, observation: Observation) -> None:
        """Adds a report."""
        now = self._clock()
        key = (observation.organ, observation.digest)
        with self._lock:
            # Taken out and put back: the first one is the one that was silent for longest.
            reports = self._reports.pop(key, None)
            reports = deque(maxlen=MAX_REPORTS) if reports is None else reports
            reports.append((now, observation))
            while now - reports[0][0] > MAX_AGE_S:
                reports.popleft()
            self._reports[key] = reports
            while len(self._reports) > MAX_BUNDLES:
                del self._reports[next(iter(self._reports))]

    def observed(self, organ: str, digest: str, since: float) -> Observation:
        """All reports of a bundle since a time, together."""
        with self._lock:
            reports = [report for at, report in self._reports.get((organ, digest), ()) if at >= since]
        total = Observation(organ, digest)
        for report in reports:
            total = total.merged(report)
        return total


def reason_to_roll_back(thresholds: Thresholds, candidate: Observation, incumbent: Observation | None) -> str:
    """Why a candidate must go back, in words; "" if it may stay.

    Args:
        thresholds: the limits.
        candidate: what was observed of it within the window.
        incumbent: the same of the stable version; none for a new organ, whose latency has no measure.
    """
    if candidate.nonfinite > thresholds.max_nonfinite:
        return (
            f"{candidate.nonfinite} of {candidate.requests} requests had outputs that are infinite or not a number "
            f"(max_nonfinite {thresholds.max_nonfinite})"
        )
    if candidate.requests < thresholds.min_requests:
        return ""
    if candidate.error_rate > thresholds.max_error_rate:
        return (
            f"{candidate.errors} of {candidate.requests} requests failed, {100 * candidate.error_rate:.3g} % "
            f"(max_error_rate {100 * thresholds.max_error_rate:.3g} %)"
        )
    if incumbent is None or min(candidate.latency.count, incumbent.latency.count) < thresholds.min_requests:
        return ""
    own = candidate.latency.quantile(thresholds.latency_quantile)
    usual = incumbent.latency.quantile(thresholds.latency_quantile)
    assert own is not None
    assert usual is not None
    if own > thresholds.max_latency_ratio * usual:
        return (
            f"{1000 * own:.3g} ms per token against the incumbent's {1000 * usual:.3g} ms, {own / usual:.3g} times as "
            f"much (max_latency_ratio {thresholds.max_latency_ratio:.3g}, quantile {thresholds.latency_quantile:g})"
        )
    return ""
