"""A sequential test on whether a version fails more often than usual, which may be evaluated after every request.

For every request of the candidate the test multiplies a capital by the ratio of two probabilities of its outcome: if
the version fails at some larger rate, over if it fails at the usual one. While the usual rate is the true one, the
expected capital does not grow, so it reaches 1 / α with a probability of at most α, for any number of evaluations
(Ville's inequality; A. Wald, "Sequential Tests of Statistical Hypotheses", 1945). Several larger rates are tried at
once, and the mean of their capitals counts (mixture; H. Robbins, "Statistical Methods Related to the Law of the
Iterated Logarithm", 1970). A version that always fails is found after a few requests, one that rarely fails later.

A capital never falls below α. A version that has long done well is found soon after it begins to fail, and a false
alarm from there takes a rise by 1 / α² (a CUSUM chart; E. S. Page, "Continuous Inspection Schemes", 1954).

The usual rate is that of the reference, which is the previous version. It is at least the rate at which the reference
or other organs fail at the time of the request: failures with a shared cause are no evidence against the candidate.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from router.rollouts.health import Slice

ALPHA = 1e-3
# With fewer requests of the reference within the window, the rate of all its known requests is used.
ENOUGH_REQUESTS = 50
# Fewer failures may have a single cause outside the candidate.
MIN_FAILURES = 3
# The usual rate is at least this part of the rate that rolls a candidate back.
USUAL_PART = 1 / 8
# The largest of the rates that are tried; the smallest is the limit.
RATES = 4
HIGHEST_RATE = 0.9
# Windows around a request, in seconds: others that fail within one of them fail for the same cause. An outage begins
# and ends, so the times before and after the request are also separate windows.
NEAR_S = ((1.0, 1.0), (10.0, 1.0), (1.0, 10.0))
# How many standard errors are added to an observed rate to estimate it from above.
STANDARD_ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class Excess:
    """A candidate fails more often than usual.

    Attributes:
        failures: failed requests since the evidence began to grow.
        requests: all requests since then.
        usual: the usual rate at the time.
    """

    failures: int
    requests: int
    usual: float


def find_excess(
    candidate: Sequence[Slice],
    reference: Sequence[Slice],
    elsewhere: Sequence[Slice],
    *,
    limit: float,
    window_s: float,
) -> Excess | None:
    """Tests whether a candidate fails more often than its reference and than is allowed.

    Args:
        candidate: its observations since it first had traffic, in order.
        reference: all known observations of the previous version, in order; empty for a new organ.
        elsewhere: observations of other organs' versions, in order; they show failures with a shared cause.
        limit: the failure rate that rolls a candidate back.
        window_s: the reference's rate is computed over this many seconds around a request, or over all its observations
            if there are too few.

    Returns:
        None if it does not.
    """
    if limit >= 1:
        return None
    floor = max(limit * USUAL_PART, 1e-6)
    rates = _rates(max(limit, 2 * floor))
    usual_rates = _UsualRates(_Counts(reference), _Counts(elsewhere), floor, window_s)
    least = math.log(ALPHA)
    capitals = [0.0] * len(rates)
    failures = requests = 0
    for each in candidate:
        if max(capitals) <= least:
            failures = requests = 0
        usual = usual_rates.at(each.start)
        failed, succeeded = each.seen.errors, each.seen.successes
        failures += failed
        requests += each.seen.requests
        capitals = [
            max(least, capital + failed * math.log(rate / usual) + succeeded * math.log((1 - rate) / (1 - usual)))
            if rate > usual
            else capital
            for capital, rate in zip(capitals, rates, strict=True)
        ]
        largest = max(capitals)
        mean = largest + math.log(sum(math.exp(capital - largest) for capital in capitals) / len(capitals))
        if mean >= -least and failures >= MIN_FAILURES:
            return Excess(failures, requests, usual)
    return None


def _rates(limit: float) -> list[float]:
    """Rates from the limit to the highest one, in a geometric sequence."""
    if limit >= HIGHEST_RATE:
        return [(1 + limit) / 2]
    return [limit * (HIGHEST_RATE / limit) ** (step / (RATES - 1)) for step in range(RATES)]


class _Counts:
    """Cumulative numbers of failed and of all requests by time."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        self._starts = [each.start for each in slices]
        self._errors = [0, *accumulate(each.seen.errors for each in slices)]
        self._requests = [0, *accumulate(each.seen.requests for each in slices)]

    def near(self, time: float, before_s: float, after_s: float) -> tuple[int, int]:
        first, last = bisect_left(self._starts, time - before_s), bisect_right(self._starts, time + after_s)
        return self._errors[last] - self._errors[first], self._requests[last] - self._requests[first]


class _UsualRates:
    """The rate at which requests fail at a time for reasons other than the candidate."""

    def __init__(self, reference: _Counts, elsewhere: _Counts, floor: float, window_s: float) -> None:
        self._reference = reference
        self._elsewhere = elsewhere
        self._floor = floor
        self._window_s = window_s

    def at(self, time: float) -> float:
        """The maximum of the floor, the reference's recent rate estimated from above, and the rates at that time."""
        errors, requests = self._reference.near(time, self._window_s, self._window_s)
        if requests < ENOUGH_REQUESTS:
            errors, requests = self._reference.near(time, math.inf, math.inf)
        found = [self._floor]
        if requests:
            # Half a failure is added (H. Jeffreys), so that no failure among few requests does not mean a rate of 0.
            found.append((errors + 0.5) / (requests + 1))
        for counts in (self._reference, self._elsewhere):
            for before_s, after_s in NEAR_S:
                errors, requests = counts.near(time, before_s, after_s)
                if requests:
                    rate = errors / requests
                    error = math.sqrt(rate * (1 - rate) / requests) if errors >= MIN_FAILURES else 0.0
                    found.append(rate + STANDARD_ERRORS * error)
        return min(max(found), 1 - 1e-6)
