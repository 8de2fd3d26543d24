"""Latency histograms that can be merged: quantiles over many Routers without storing every time."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

# Buckets per factor of two: the error of a quantile is at most 4.5 %.
PER_DOUBLING = 8
# From about a microsecond to about seventeen minutes; times outside count in the nearest bucket.
LOWEST = -20 * PER_DOUBLING
HIGHEST = 10 * PER_DOUBLING


@dataclass(frozen=True, slots=True)
class LatencyHistogram:
    """A histogram of times.

    Attributes:
        counts: bucket `floor(8 · log2(seconds))` → number of times.
    """

    counts: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, times_s: Iterable[float]) -> Self:
        """The histogram of times in seconds; times of 0 or less count in the lowest bucket."""
        return cls(dict(Counter(_bucket(time_s) for time_s in times_s)))

    @property
    def count(self) -> int:
        """The number of times."""
        return sum(self.counts.values())

    def merged(self, other: "LatencyHistogram") -> "LatencyHistogram":
        """The sum of this and another histogram."""
        return LatencyHistogram(dict(Counter(self.counts) + Counter(other.counts)))

    def quantile(self, quantile: float) -> float | None:
        """The quantile in seconds; None for an empty histogram."""
        rank = math.ceil(quantile * self.count)
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank and seen:
                return float(2 ** ((bucket + 0.5) / PER_DOUBLING))
        return None


def _bucket(time_s: float) -> int:
    if not time_s > 0:
        return LOWEST
    if math.isinf(time_s):
        return HIGHEST
    return min(max(math.floor(PER_DOUBLING * math.log2(time_s)), LOWEST), HIGHEST)
