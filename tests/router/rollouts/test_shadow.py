from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.errors import UnknownRolloutError
from router.rollouts.settings import RolloutPlan
from router.rollouts.shadow import ShadowRecord, ShadowReport
from router.rollouts.store import RolloutStore
from tests.router.rollouts.support import digest

TOKENS = st.lists(st.integers(0, 5), max_size=12)


@pytest.mark.parametrize(
    ("incumbent", "candidate", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], ShadowRecord(3, 3, None)),
        ([1, 2, 3], [1, 9, 3], ShadowRecord(3, 2, 1)),
        ([1, 2, 3], [1, 2], ShadowRecord(3, 2, 2)),
        ([], [7, 7], ShadowRecord(2, 0, 0)),
        ([1, 1, 2], [2, 1, 1, 1], ShadowRecord(4, 3, 0)),
        ([], [], ShadowRecord(0, 0, None)),
    ],
)
def test_comparing(incumbent: list[int], candidate: list[int], expected: ShadowRecord) -> None:
    assert ShadowRecord.of(incumbent, candidate) == expected


@given(TOKENS, TOKENS)
def test_comparing_has_no_direction_and_stays_in_its_bounds(first: list[int], second: list[int]) -> None:
    record = ShadowRecord.of(first, second)
    assert record == ShadowRecord.of(second, first)
    assert 0 <= record.shared_tokens <= record.tokens == max(len(first), len(second))
    assert (record.first_divergence is None) == (first == second)


def test_a_report_adds_up() -> None:
    records = [
        ShadowRecord.of([1, 2], [1, 2], incumbent_s_per_token=0.01, candidate_s_per_token=0.02),
        ShadowRecord.of([1, 2, 3, 4], [1, 2, 9, 9], incumbent_s_per_token=0.02, candidate_s_per_token=0.01),
        ShadowRecord.of([1], [2]),
    ]
    report = ShadowReport().with_records(records)
    assert (report.requests, report.identical, report.identical_rate) == (3, 1, 1 / 3)
    assert report.token_overlap == 4 / 7
    assert (report.mean_first_divergence, report.first_divergence_min) == (1.0, 0)
    assert report.latency_ratio == pytest.approx(1)
    empty = ShadowReport()
    assert (empty.token_overlap, empty.identical_rate, empty.mean_first_divergence, empty.latency_ratio) == (None,) * 4


def test_reports_are_kept_per_rollout_and_are_not_history(store: RolloutStore) -> None:
    with store.write() as transaction:
        rollout = transaction.stage("heart", digest("n"), RolloutPlan(), actor="a", reason="")
    head = store.head()
    assert store.shadow_report(rollout.id) == ShadowReport()
    store.record_shadow(rollout.id, [ShadowRecord(10, 9, 4, 1.5)])
    report = store.record_shadow(rollout.id, [ShadowRecord(10, 10, None, 0.5)] * 2)
    assert store.shadow_report(rollout.id) == report
    assert (report.requests, report.identical, report.tokens, report.shared_tokens) == (3, 2, 30, 29)
    assert store.head() == head
    with pytest.raises(UnknownRolloutError):
        store.record_shadow("heart-99", [])


def test_nothing_of_the_answers_is_stored(store: RolloutStore, tmp_path: Path) -> None:
    assert set(ShadowRecord.__slots__) == {"tokens", "shared_tokens", "first_divergence", "latency_ratio"}
