"""What a gate may say, and how its figures decide."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from router.rollouts.gates import Comparison, Evidence, Gate, decide
from router.rollouts.rollout_file import RolloutFile


def gate(**fields: Any) -> Gate:
    return Gate.model_validate({"dataset": "/data/held.json", "metric": "attribute_f1", "organ": "heart", **fields})


def evidence(value: float, comparison: tuple[float, float, float, float] | None = None) -> Evidence:
    """With the incumbent's score, the difference and its interval."""
    found = None
    if comparison is not None:
        incumbent, difference, low, high = comparison
        found = Comparison(
            incumbent_digest="b" * 64, incumbent_value=incumbent, difference=difference, low=low, high=high
        )
    return Evidence(value=value, low=0.7, high=0.9, records=40, dataset_digest="d" * 64, comparison=found)


@pytest.mark.parametrize("number", [-0.01, 1.01, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["at_least", "not_below_incumbent_by"])
def test_numbers_that_are_no_share_are_refused(field: str, number: float) -> None:
    with pytest.raises(ValidationError, match=field):
        gate(**{field: number})


@pytest.mark.parametrize("fields", [{}, {"at_least": None}, {"at_least": 0.5, "metric": "Attribute F1"}])
def test_a_gate_demands_something_of_a_metric(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        gate(**fields)


@pytest.mark.parametrize(("value", "passed"), [(0.8, True), (0.7999, False), (0.95, True)])
def test_at_least_compares_the_point_estimate(value: float, passed: bool) -> None:
    verdict = decide(gate(at_least=0.8), evidence(value))
    assert verdict.passed == passed
    assert ("it must be at least 0.8" in verdict.text) != passed
    assert f"attribute_f1 of heart is {value:.3f} [0.700, 0.900]" in verdict.text
    assert "on 40 records of the dataset dddddddddddd…" in verdict.text


@pytest.mark.parametrize(("high", "passed"), [(-0.021, False), (-0.02, True), (-0.019, True), (0.0, True), (0.3, True)])
def test_a_worse_one_is_refused_beyond_margin_and_chance(high: float, passed: bool) -> None:
    verdict = decide(gate(not_below_incumbent_by=0.02), evidence(0.8, (0.9, -0.1, -0.15, high)))
    assert verdict.passed == passed
    assert "the incumbent's is 0.900, a difference of -0.100 [-0.150," in verdict.text
    assert ("worse than the incumbent by 0.02 at most" in verdict.text) != passed


def test_both_rules_must_hold() -> None:
    both = gate(at_least=0.9, not_below_incumbent_by=0.0)
    verdict = decide(both, evidence(0.8, (0.9, -0.1, -0.15, -0.05)))
    assert not verdict.passed
    assert "at least 0.9" in verdict.text
    assert "worse than the incumbent by 0 at most" in verdict.text


def test_a_rollout_file_has_gates_of_its_own_organ_only() -> None:
    fields = {"organ": "heart", "version": "1.1.0"}
    file = RolloutFile.model_validate({**fields, "gates": [gate(at_least=0.8).model_dump()]})
    assert file.plan.gates == (gate(at_least=0.8),)
    with pytest.raises(ValidationError, match="gates are about the rollout's organ, heart, and not about liver"):
        RolloutFile.model_validate({**fields, "gates": [gate(at_least=0.8, organ="liver").model_dump()]})


def test_gates_tell_files_apart_and_leave_older_ones_what_they_were() -> None:
    plain = RolloutFile(organ="heart", version="1.1.0")
    gated = plain.model_copy(update={"gates": (gate(at_least=0.8),)})
    # What the same file was before there were gates.
    assert plain.identity("a" * 64) == "957f57335f92a707671c3e9ba94b1a333dac630b619fbec812cd7979008ea71d"
    assert gated.identity("a" * 64) != plain.identity("a" * 64)
