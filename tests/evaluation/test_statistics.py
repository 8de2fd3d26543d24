"""Scores from rows, intervals and paired tests, against values computed by hand and against simulation."""

import numpy as np
import pytest

from echovlm_ray.evaluation.statistics import (
    NotComputableError,
    Statistic,
    clusters_of,
    compare,
    f1_statistic,
    intervals,
    macro_f1_statistic,
    mean_statistic,
)

ALONE = np.arange(100)


def test_micro_f1_by_hand() -> None:
    # 5 right, 1 wrong, 2 missed: 10 / (10 + 1 + 2).
    assert f1_statistic([(3, 1, 0), (2, 0, 2)], "").value() == pytest.approx(10 / 13)


def test_macro_f1_by_hand() -> None:
    truths = ["cyst", "cyst", "mass", "mass", "normal"]
    answers = ["cyst", "mass", "mass", None, "something else"]
    # cyst: 1 hit, 1 missed → 2/3; mass: 1 hit, 1 wrong, 1 missed → 1/2; normal: 0.
    assert macro_f1_statistic(truths, answers).value() == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_what_allows_no_score_is_an_error_with_its_reason() -> None:
    with pytest.raises(NotComputableError, match="no record"):
        mean_statistic([]).value()
    with pytest.raises(NotComputableError, match="no attributes"):
        f1_statistic([(0, 0, 0)], "there are no attributes").value()


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        values = rng.random(100) < 0.7
        ((low, high),) = intervals([mean_statistic(list(map(float, values)))], ALONE, draws=400, seed=trial)  # type: ignore[misc]
        covered += low <= 0.7 <= high
    assert 0.9 <= covered / 200 <= 0.985


def test_records_of_one_patient_are_drawn_together() -> None:
    values = [float(number % 10 < 5) for number in range(100)]
    together = clusters_of([f"patient {number // 50}" for number in range(100)])
    of_patients = [1.0] * 50 + [0.0] * 50
    (alone,) = intervals([mean_statistic(of_patients)], ALONE, draws=500, seed=0)
    (clustered,) = intervals([mean_statistic(of_patients)], together, draws=500, seed=0)
    assert alone is not None
    assert clustered == (0.0, 1.0)
    assert alone[1] - alone[0] < 0.3
    # Where both patients are alike there is nothing to vary.
    (same,) = intervals([mean_statistic(values)], together, draws=500, seed=0)
    assert same == pytest.approx((0.5, 0.5))


def test_one_patient_has_no_interval() -> None:
    assert intervals([mean_statistic([1.0, 0.0])], np.zeros(2, dtype=np.int64), draws=100, seed=0) == [None]


def test_the_same_seed_gives_the_same_interval() -> None:
    statistic = mean_statistic([float(number % 3 == 0) for number in range(100)])
    first, again, other = (intervals([statistic], ALONE, draws=300, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again != other


def test_records_that_a_metric_leaves_out_change_nothing() -> None:
    statistic = mean_statistic([1.0, 0.0, 1.0])
    spread = statistic.spread([5, 1, 3], 8)
    assert spread.value() == statistic.value()
    assert spread.rows[[0, 2, 4, 6, 7]].sum() == 0


def test_a_paired_test_sees_what_is_paired() -> None:
    rng = np.random.default_rng(0)
    first = (rng.random(100) < 0.5).astype(float)
    second = first.copy()
    second[np.flatnonzero(first == 0)[:12]] = 1.0
    found = compare(mean_statistic(list(first)), mean_statistic(list(second)), ALONE, draws=2000, seed=0)
    assert found.value == pytest.approx(0.12)
    assert found.low is not None
    assert found.high is not None
    assert 0.05 < found.low < 0.12 < found.high < 0.2
    # Of 12 changes all one way: 2 · 0.5¹² = 0.0005.
    assert found.p_value == pytest.approx(2 * 0.5**12, abs=0.001)


def test_the_p_value_is_exact_on_few_records() -> None:
    # All four of four improve: 2 of 16 exchanges differ as much.
    found = compare(mean_statistic([0.0] * 4), mean_statistic([1.0] * 4), np.arange(4), draws=8000, seed=0)
    assert found.p_value == pytest.approx(2 / 16, abs=0.015)


def test_equal_versions_do_not_differ() -> None:
    values = [float(number % 3 == 0) for number in range(100)]
    found = compare(mean_statistic(values), mean_statistic(values), ALONE, draws=500, seed=0)
    assert (found.value, found.p_value) == (0.0, 1.0)


def test_chance_alone_is_seldom_significant() -> None:
    rng = np.random.default_rng(8)
    small = 0
    for trial in range(200):
        first, second = (mean_statistic(list((rng.random(60) < 0.6).astype(float))) for _ in range(2))
        small += compare(first, second, np.arange(60), draws=300, seed=trial).p_value <= 0.05
    assert small / 200 <= 0.09


def test_a_test_needs_two_patients() -> None:
    one = mean_statistic([1.0, 0.0])
    with pytest.raises(NotComputableError, match="at least two patients"):
        compare(one, one, np.zeros(2, dtype=np.int64), draws=100, seed=0)


def test_resamples_without_a_score_take_the_interval_away() -> None:
    # One record of a hundred has the attribute: a third of the resamples have none.
    statistic = f1_statistic([(1, 0, 0)] + [(0, 0, 0)] * 99, "")
    assert statistic.value() == 1.0
    assert intervals([statistic], ALONE, draws=500, seed=0) == [None]
    assert isinstance(statistic, Statistic)
