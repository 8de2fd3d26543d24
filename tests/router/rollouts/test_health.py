import itertools

from hypothesis import given
from hypothesis import strategies as st

from router.rollouts.health import MAX_AGE_S, MAX_BUNDLES, MAX_SLICES, SLICE_S, HealthMonitor, Observation, Slice
from router.rollouts.latency import LatencyHistogram
from tests.router.rollouts.support import Clock

TIMES = st.lists(st.floats(1e-5, 900), min_size=1, max_size=60)


@given(TIMES, st.floats(0.01, 0.99))
def test_a_quantile_is_close_to_the_true_one(times: list[float], quantile: float) -> None:
    found = LatencyHistogram.of(times).quantile(quantile)
    assert found is not None
    true = sorted(times)[max(0, -(-int(quantile * 1e9) * len(times) // 10**9) - 1)]
    neighbours = [value for value in times if abs(value / true - 1) < 1e-6] or [true]
    assert any(0.95 < found / value < 1.05 for value in neighbours)


@given(TIMES, TIMES)
def test_merging_is_the_same_as_measuring_together(first: list[float], second: list[float]) -> None:
    merged = LatencyHistogram.of(first).merged(LatencyHistogram.of(second))
    assert merged == LatencyHistogram.of(first + second)
    assert merged.count == len(first) + len(second)


def test_times_that_cannot_be_are_counted_at_the_ends() -> None:
    odd = LatencyHistogram.of([0.0, -1.0, float("nan"), float("inf"), 1e9])
    assert odd.count == 5
    assert LatencyHistogram().quantile(0.5) is None


def observed(requests: int, errors: int = 0, nonfinite: int = 0, time_s: float = 0.01) -> Observation:
    latency = LatencyHistogram.of([time_s] * (requests - errors))
    return Observation("heart", "d", requests, errors, nonfinite, latency)


def test_only_what_was_reported_since_a_time_counts(clock: Clock) -> None:
    monitor = HealthMonitor(clock.monotonic)
    monitor.record(observed(3))
    clock.move(10)
    monitor.record(observed(4, errors=1))
    monitor.record(Observation("heart", "other", 100))
    assert monitor.observed("heart", "d", clock.monotonic() - 5) == observed(4, errors=1)
    total = monitor.observed("heart", "d", 0)
    assert (total.requests, total.errors, total.latency.count) == (7, 1, 6)
    assert monitor.observed("liver", "d", 0).requests == 0


def test_what_is_kept_is_bounded(clock: Clock) -> None:
    monitor = HealthMonitor(clock.monotonic)
    monitor.record(observed(1))
    clock.move(MAX_AGE_S + 1)
    monitor.record(observed(1))
    assert monitor.observed("heart", "d", 0).requests == 1
    for number in itertools.islice(itertools.count(), MAX_BUNDLES):
        monitor.record(Observation("heart", f"bundle {number}", 1))
    assert monitor.observed("heart", "d", 0).requests == 0
    assert monitor.observed("heart", "bundle 0", 0).requests == 1


def test_reports_of_one_second_are_kept_as_one(clock: Clock) -> None:
    monitor = HealthMonitor(clock.monotonic)
    for _ in range(4):
        monitor.record(observed(2, errors=1))
        clock.move(SLICE_S / 2)
    assert monitor.slices("heart", "d") == [Slice(0.0, observed(4, errors=2)), Slice(SLICE_S, observed(4, errors=2))]
    for _ in range(MAX_SLICES):
        clock.move(SLICE_S)
        monitor.record(observed(1))
    assert len(monitor.slices("heart", "d")) == MAX_SLICES


def test_the_wall_clock_changes_nothing_of_what_is_kept(clock: Clock) -> None:
    monitor = HealthMonitor(clock.monotonic)
    monitor.record(observed(1))
    for step_s in (3600, -7200):
        clock.set(step_s)
        clock.move(1)
        monitor.record(observed(1))
    assert monitor.observed("heart", "d", 0).requests == 3
    assert monitor.observed("heart", "d", 1).requests == 2
