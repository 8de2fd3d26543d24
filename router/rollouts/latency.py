"""Latency histograms that can be merged: quantiles over many Routers without keeping every time."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

# Buckets a doubling: a quantile is at most 4.5 % off.
PER_DOUBLING = 8
# From about a microsecond to about seventeen minutes; what is outside counts as the nearest.
LOWEST = -20 * PER_DOUBLING
HIGHEST = 10 * PER_DOUBLING


@dataclass(frozen=True, slots=True)
class LatencyHistogram:
    """How often which time was seen.

    Attributes:
        counts: bucket `floor(8 · log2(seconds))` → how many.
    """

    counts: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, times_s: Iterable[float]) -> Self:
        """The histogram of some times in seconds; times that are not above 0 count as the shortest."""
        return cls(dict(Counter(_bucket(time_s) for time_s in times_s)))

    @property
    def count(self) -> int:
        """How many times it holds."""
        return sum(self.counts.values())

    def merged(self, other: "LatencyHistogram") -> "LatencyHistogram":
        """This one and another together."""
        return LatencyHistogram(dict(Counter(self.counts) + Counter(other.counts)))

    def quantile(self, quantile: float) -> float | None:
        """The time in seconds that this part of all times does not exceed; none of an empty histogram."""
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
