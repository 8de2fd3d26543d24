"""A sequential test on whether a version fails more often than usual, which may be evaluated after every request.

For every request of the candidate the test multiplies a capital by the ratio of two probabilities of its outcome: if
the version fails at some larger rate, over if it fails at the usual one. While the usual rate is the true one, the
expected capital does not grow, so it reaches 1 / α with a probability of at most α, however often one looks (Ville's
inequality; A. Wald, "Sequential Tests of Statistical Hypotheses", 1945). Several larger rates are tried at once, and
the mean of their capitals counts (mixture; H. Robbins, "Statistical Methods Related to the Law of the Iterated
Logarithm", 1970): what always fails is found after a few requests, what rarely does later.

A capital never falls below α. A version that has long done well is found soon after it begins to fail, and a false
alarm from there takes a rise by 1 / α² (a CUSUM chart; E. S. Page, "Continuous Inspection Schemes", 1954).

The usual rate is that of the reference, the version before, and at least the rate at which it or other organs fail at
the time of the request: when all fail alike, because of something that they share, it says nothing of the candidate.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from router.rollouts.health import Slice

ALPHA = 1e-3
# With fewer requests of the reference within the window, its rate is that of all that is known of it.
ENOUGH_REQUESTS = 50
# Fewer failures may all have one cause that lies elsewhere.
MIN_FAILURES = 3
# The usual rate is at least this part of the rate that rolls a candidate back: versions as good as that may stay.
USUAL_PART = 1 / 8
# Larger rates that are tried, between the limit and this one.
RATES = 4
HIGHEST_RATE = 0.9
# Around a request, in seconds: others that fail within one of these times fail for the same cause. An outage begins
# and ends, so the seconds before and after are also looked at alone.
NEAR_S = ((1.0, 1.0), (10.0, 1.0), (1.0, 10.0))
# A rate that is seen in so few requests may truly be larger by so many standard errors.
STANDARD_ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class Excess:
    """A candidate was found to fail more often than is usual.

    Attributes:
        failures: of how many requests, when it was found; since the evidence began to grow.
        requests: how many those were.
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
        candidate: what was seen of it since it first had traffic, in order.
        reference: what was seen of the version before, as far back as is known, in order; empty for a new organ.
        elsewhere: what was seen of other organs' versions, in order: what they share with the candidate may fail.
        limit: a rate of failures that rolls a candidate back.
        window_s: the reference's rate is that of so many seconds around, where it had enough requests then; where it
            had not, all that is known of it counts.

    Returns:
        None while it may stay.
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
    """From the limit to the highest rate, each the same number of times the one before."""
    if limit >= HIGHEST_RATE:
        return [(1 + limit) / 2]
    return [limit * (HIGHEST_RATE / limit) ** (step / (RATES - 1)) for step in range(RATES)]


class _Counts:
    """Failed and all requests by time."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        self._starts = [each.start for each in slices]
        self._errors = [0, *accumulate(each.seen.errors for each in slices)]
        self._requests = [0, *accumulate(each.seen.requests for each in slices)]

    def near(self, time: float, before_s: float, after_s: float) -> tuple[int, int]:
        first, last = bisect_left(self._starts, time - before_s), bisect_right(self._starts, time + after_s)
        return self._errors[last] - self._errors[first], self._requests[last] - self._requests[first]


class _UsualRates:
    """The rate at which requests fail at a time for reasons that are not the candidate's own."""

    def __init__(self, reference: _Counts, elsewhere: _Counts, floor: float, window_s: float) -> None:
        self._reference = reference
        self._elsewhere = elsewhere
        self._floor = floor
        self._window_s = window_s

    def at(self, time: float) -> float:
        """The largest of: the floor; the reference's recent rate, estimated from above; any rate just then."""
        errors, requests = self._reference.near(time, self._window_s, self._window_s)
        if requests < ENOUGH_REQUESTS:
            errors, requests = self._reference.near(time, math.inf, math.inf)
        found = [self._floor]
        if requests:
            # Half a failure more than was seen (H. Jeffreys): none among few requests does not make the rate 0.
            found.append((errors + 0.5) / (requests + 1))
        for counts in (self._reference, self._elsewhere):
            for before_s, after_s in NEAR_S:
                errors, requests = counts.near(time, before_s, after_s)
                if requests:
                    rate = errors / requests
                    error = math.sqrt(rate * (1 - rate) / requests) if errors >= MIN_FAILURES else 0.0
                    found.append(rate + STANDARD_ERRORS * error)
        return min(max(found), 1 - 1e-6)
