import random
from collections.abc import Sequence

import pytest

from router.rollouts.health import Observation, Slice
from router.rollouts.sequential import MIN_FAILURES, Excess, find_excess

LIMIT = 0.02


def slices(*counts: tuple[int, int], start: float = 0.0) -> list[Slice]:
    """(Requests, failures) of one second after another."""
    return [
        Slice(start + number, Observation("heart", "d", requests, errors))
        for number, (requests, errors) in enumerate(counts)
    ]


def found(
    candidate: Sequence[Slice], reference: Sequence[Slice] = (), elsewhere: Sequence[Slice] = (), limit: float = LIMIT
) -> Excess | None:
    return find_excess(candidate, reference, elsewhere, limit=limit, window_s=300)


def drawn(seed: int, rate: float, seconds: int, requests: int = 1) -> list[Slice]:
    generator = random.Random(seed)
    return slices(*((requests, sum(generator.random() < rate for _ in range(requests))) for _ in range(seconds)))


def test_what_always_fails_is_found_after_a_handful() -> None:
    excess = found(slices(*[(1, 1)] * 48))
    assert excess is not None
    assert (excess.failures, excess.requests) == (MIN_FAILURES, MIN_FAILURES)
    assert found(slices((1, 1), (1, 1))) is None


def test_every_tenth_failure_is_found_within_a_hundred_requests_19_times_in_20() -> None:
    hits = sum(found(drawn(seed, 0.1, 100)) is not None for seed in range(400))
    assert hits >= 380


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.0025])
def test_the_usual_rate_is_not_found_however_long_one_looks(rate: float) -> None:
    assert not any(found(drawn(seed, rate, 2000, requests=5)) for seed in range(100))


@pytest.mark.parametrize("rate", [0.005, 0.01, 0.03])
def test_an_incumbent_that_fails_as_often_is_the_measure(rate: float) -> None:
    for seed in range(50):
        assert found(drawn(seed, rate, 600, requests=5), drawn(1000 + seed, rate, 600, requests=20)) is None


def test_an_incumbent_that_does_not_fail_excuses_nothing() -> None:
    assert found(slices(*[(1, 1)] * 5), slices(*[(10, 0)] * 5)) is not None


@pytest.mark.parametrize("shared", ["reference", "elsewhere"])
def test_an_outage_that_others_share_says_nothing(shared: str) -> None:
    candidate = slices(*[(10, 0)] * 30, *[(10, 8)] * 5, *[(10, 0)] * 30)
    others = slices(*[(10, 0)] * 30, *[(10, 9)] * 5, *[(10, 0)] * 30)
    quiet = slices(*[(10, 0)] * 65)
    assert found(candidate, quiet, quiet) is not None
    if shared == "reference":
        assert found(candidate, others, quiet) is None
    else:
        assert found(candidate, quiet, others) is None


def test_a_version_that_did_well_for_long_is_found_soon_after_it_begins_to_fail() -> None:
    good = [(10, 0)] * 1000
    excess = found(slices(*good, *[(1, 1)] * 10))
    assert excess is not None
    assert excess.failures == excess.requests <= 7


def test_rates_at_the_ends_have_an_answer() -> None:
    bad = slices(*[(1, 1)] * 100)
    assert found(bad, limit=1.0) is None
    assert found(bad, limit=0.95) is not None
    assert found(slices((100, 3)), limit=0.0) is not None
    assert found(bad, slices(*[(1, 1)] * 100)) is None
    assert found([]) is None
