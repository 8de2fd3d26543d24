"""Decides when a version must be rolled back, from the Routers' observations of it and of the version before."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from router.rollouts.health import SLICE_S, HealthMonitor, Observation, Slice, total
from router.rollouts.latency import LatencyHistogram
from router.rollouts.records import Rollout
from router.rollouts.sequential import MIN_FAILURES, find_excess
from router.rollouts.settings import Thresholds

# A quantile counts as larger than another only beyond this many standard errors of its rank, on both sides.
STANDARD_ERRORS = 3.0
# Only times of requests that ended within this many seconds of each other (two slices) are compared.
BESIDE_S = 2 * SLICE_S


def judge(
    monitor: HealthMonitor,
    rollout: Rollout,
    thresholds: Thresholds,
    since: float,
    reference: str | None,
    elsewhere: Iterable[tuple[str, str]] = (),
    step_since: float | None = None,
) -> str:
    """The reason to roll back a version, as text; "" if there is none.

    Args:
        monitor: the observations.
        rollout: the version's rollout.
        thresholds: the limits.
        since: requests count from this time on, by the monitor's clock.
        reference: the previous version; None for a new organ, whose latency is not judged.
        elsewhere: (organ, digest) of the other organs' versions.
        step_since: when the current step began; by default `since`. Latency is judged within one step, because the load
            of the versions changes with their share of the requests.
    """
    own = monitor.slices(rollout.organ, rollout.digest, since)
    usual = [] if reference is None else monitor.slices(rollout.organ, reference)
    recent = max(since, monitor.clock() - thresholds.window_s)
    step = since if step_since is None else max(since, step_since)
    candidate = total(rollout.organ, rollout.digest, [each for each in own if each.start >= recent])
    others: list[Slice] = []
    if sum(each.seen.errors for each in own) >= MIN_FAILURES:
        found = (monitor.slices(organ, digest, since - thresholds.window_s) for organ, digest in elsewhere)
        others = sorted((each for slices in found for each in slices), key=lambda each: each.start)
    return (
        _not_finite(thresholds, candidate)
        or _failing(thresholds, own, usual, others)
        or _slow(thresholds, *_comparable(thresholds, own, usual, (max(recent, step), step)))
    )


def unjudged_latency(monitor: HealthMonitor, rollout: Rollout, thresholds: Thresholds, since: float) -> str:
    """Explains that there are too few requests to judge a candidate's latency; "" if there are enough, and for new
    organs.

    Args:
        monitor: what was observed.
        rollout: the candidate's.
        thresholds: the limits.
        since: its requests count from here on, in seconds of the monitor's clock.
    """
    if rollout.incumbent_digest is None:
        return ""
    own = monitor.slices(rollout.organ, rollout.digest, since)
    usual = monitor.slices(rollout.organ, rollout.incumbent_digest)
    compared = min(times.count for times in _comparable(thresholds, own, usual, (since,)))
    if compared >= thresholds.min_requests:
        return ""
    return (
        f"latency was not judged: only {compared} of its requests ended beside the incumbent's "
        f"(min_requests {thresholds.min_requests})"
    )


def _comparable(
    thresholds: Thresholds, own: Sequence[Slice], usual: Sequence[Slice], starts: Sequence[float]
) -> tuple[LatencyHistogram, LatencyHistogram]:
    """Times of both versions that were measured concurrently, from the first start that leaves enough of them."""
    for start in starts:
        own_since = [each for each in own if each.start >= start]
        usual_since = [each for each in usual if each.start >= start]
        candidate = total("", "", _beside(own_since, usual_since)).latency
        incumbent = total("", "", _beside(usual_since, own_since)).latency
        if min(candidate.count, incumbent.count) >= thresholds.min_requests:
            break
    return candidate, incumbent


def _beside(slices: Sequence[Slice], others: Sequence[Slice]) -> list[Slice]:
    """The slices with times of the other version nearby.

    A burst of requests that all get one version, for example because of their session key, slows that version's tokens.
    Compared with times of another hour it would look like a regression. Concurrent requests are slowed alike.
    """
    starts = [each.start for each in others if each.seen.latency.count]
    places = ((each, bisect_left(starts, each.start - BESIDE_S)) for each in slices)
    return [each for each, place in places if place < len(starts) and starts[place] <= each.start + BESIDE_S]


def _not_finite(thresholds: Thresholds, candidate: Observation) -> str:
    if candidate.nonfinite <= thresholds.max_nonfinite:
        return ""
    return (
        f"{candidate.nonfinite} of {candidate.requests} requests had outputs that are infinite or not a number "
        f"(max_nonfinite {thresholds.max_nonfinite})"
    )


def _failing(
    thresholds: Thresholds, candidate: Sequence[Slice], reference: Sequence[Slice], elsewhere: Sequence[Slice]
) -> str:
    limit = thresholds.max_error_rate
    excess = find_excess(
        candidate,
        reference,
        elsewhere,
        limit=limit,
        window_s=thresholds.window_s,
    )
    if excess is None:
        return ""
    rate = 100 * excess.failures / excess.requests
    return (
        f"{excess.failures} of {excess.requests} requests failed, {rate:.3g} %, where {100 * excess.usual:.2g} % are "
        f"usual (max_error_rate {100 * limit:.3g} %)"
    )


def _slow(thresholds: Thresholds, candidate: LatencyHistogram, incumbent: LatencyHistogram) -> str:
    if min(candidate.count, incumbent.count) < thresholds.min_requests:
        return ""
    quantile = thresholds.latency_quantile
    # Lower and upper confidence bounds.
    least, most = _bound(candidate, quantile, -STANDARD_ERRORS), _bound(incumbent, quantile, STANDARD_ERRORS)
    if least <= thresholds.max_latency_ratio * most:
        return ""
    own, usual = _bound(candidate, quantile), _bound(incumbent, quantile)
    return (
        f"{1000 * own:.3g} ms per token against the incumbent's {1000 * usual:.3g} ms, {own / usual:.3g} times as "
        f"much (max_latency_ratio {thresholds.max_latency_ratio:.3g}, quantile {quantile:g})"
    )


def _bound(latency: LatencyHistogram, quantile: float, standard_errors: float = 0.0) -> float:
    """A quantile of times in seconds, moved by standard errors of its rank, which is binomial."""
    moved = quantile + standard_errors * math.sqrt(quantile * (1 - quantile) / latency.count)
    found = latency.quantile(min(max(moved, 0.0), 1.0))
    assert found is not None
    return found
