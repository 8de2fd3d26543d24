import dataclasses
import random

import pytest

from router.rollouts.health import HealthMonitor, Observation
from router.rollouts.judge import judge
from router.rollouts.latency import LatencyHistogram
from router.rollouts.settings import Thresholds
from tests.router.rollouts.support import Clock
from tests.router.rollouts.test_health import observed
from tests.router.rollouts.world import World

LIMITS = Thresholds(min_requests=20, max_error_rate=0.1, max_latency_ratio=1.5)


def judged(world: World, candidate: Observation, incumbent: Observation | None) -> str:
    monitor = HealthMonitor(world.clock.monotonic)
    world.stage()
    rollout = dataclasses.replace(world.rollout(), digest="d")
    monitor.record(candidate)
    if incumbent is not None:
        monitor.record(dataclasses.replace(incumbent, digest="i"))
    return judge(monitor, rollout, LIMITS, 0.0, None if incumbent is None else "i")


@pytest.mark.parametrize(
    ("candidate", "incumbent", "words"),
    [
        (observed(1, nonfinite=1), observed(0), "1 of 1 requests had outputs that are infinite"),
        (observed(5, errors=5), observed(100), "5 of 5 requests failed, 100 %"),
        (observed(5, errors=5), None, "5 of 5 requests failed"),
        (observed(2, errors=2), observed(100), ""),
        (observed(20, errors=2), observed(100), ""),
        (observed(20, errors=10), observed(100), "10 of 20 requests failed, 50 %"),
        (observed(20, errors=10), observed(100, errors=40), ""),
        (observed(20, time_s=0.014), observed(20), ""),
        (observed(20, time_s=0.02), observed(20), "2 times as much"),
        (observed(20, time_s=0.02), observed(19), ""),
        (observed(20, time_s=0.02), None, ""),
        (observed(0), observed(0), ""),
    ],
)
def test_thresholds(world: World, candidate: Observation, incumbent: Observation | None, words: str) -> None:
    reason = judged(world, candidate, incumbent)
    assert words in reason
    assert bool(reason) == bool(words)


def test_noise_is_not_slowness_and_slowness_is_found_in_noise(world: World) -> None:
    generator = random.Random(0)
    world.stage()
    rollout = dataclasses.replace(world.rollout(), digest="d")

    def reasons(slowness: float, trials: int) -> int:
        found = 0
        for _ in range(trials):
            monitor = HealthMonitor(Clock().monotonic)
            for digest, factor, count in (("d", slowness, 25), ("i", 1.0, 475)):
                times = [factor * generator.lognormvariate(-3, 0.8) for _ in range(count)]
                monitor.record(Observation("heart", digest, count, latency=LatencyHistogram.of(times)))
            found += bool(judge(monitor, rollout, LIMITS, 0.0, "i"))
        return found

    # Of as many a plain ratio of medians takes back several.
    assert reasons(1.0, 1000) == 0
    assert reasons(5.0, 50) >= 45


def test_a_burst_for_one_version_alone_does_not_make_it_slow(world: World) -> None:
    clock = Clock()
    monitor = HealthMonitor(clock.monotonic)
    world.stage()
    rollout = dataclasses.replace(world.rollout(), digest="d")

    def ran(digest: str, count: int, time_s: float) -> None:
        latency = LatencyHistogram.of([time_s] * count)
        monitor.record(Observation("heart", digest, count, latency=latency))

    for _ in range(5):
        # The sessions of one caller all get the candidate; the incumbent has requests at quiet times only.
        ran("d", 60, 0.5)
        clock.passed += 10
        ran("i", 60, 0.01)
        clock.passed += 10
    assert not judge(monitor, rollout, LIMITS, 0.0, "i")
    ran("i", 30, 0.01)
    ran("d", 30, 0.5)
    assert "times as much" in judge(monitor, rollout, LIMITS, 0.0, "i")
