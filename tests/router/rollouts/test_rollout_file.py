from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from router.rollouts.rollout_file import RolloutFile
from router.rollouts.settings import Step
from tests.router.rollouts.support import digest

TEXT = """
organ: heart
version: 2.0.0
reason: finer valves
steps:
  - {mode: shadow, percent: 10, hold_s: 600}
  - {percent: 5, hold_s: 600}
  - {percent: 50, hold_s: 600}
thresholds: {min_requests: 100, max_error_rate: 0.01}
"""


def parsed(**changes: Any) -> RolloutFile:
    values = {**yaml.safe_load(TEXT), **changes}
    return RolloutFile.model_validate({key: value for key, value in values.items() if value is not None})


def test_a_file_becomes_a_plan() -> None:
    file = parsed()
    assert file.plan.promote
    assert file.plan.steps[0] == Step(mode="shadow", percent=10, hold_s=600)
    assert file.plan.thresholds is not None
    assert file.plan.thresholds.max_error_rate == 0.01


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"digest": digest("x")}, "either the bundle's version or its digest"),
        ({"version": None}, "either the bundle's version or its digest"),
        ({"version": None, "digest": "latest"}, "digest"),
        ({"organ": "../heart"}, "organ"),
        ({"step": []}, "Extra inputs are not permitted"),
        ({"steps": [{"percent": 0, "hold_s": 1}]}, "greater than 0"),
        ({"steps": [{"percent": 101, "hold_s": 1}]}, "less than or equal to 100"),
        ({"steps": [{"percent": 50, "hold_s": 1}, {"percent": 5, "hold_s": 1}]}, "must not fall"),
        ({"thresholds": {"max_errors": 1}}, "Extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        parsed(**changes)


def test_any_change_makes_another_file_and_spelling_makes_none() -> None:
    key = digest("x")
    same = {parsed().identity(key), parsed(version="v2").identity(key), parsed(attempt=1, promote=True).identity(key)}
    assert len(same) == 1
    others = {
        parsed().identity(digest("y")),
        parsed(organ="liver").identity(key),
        parsed(steps=[]).identity(key),
        parsed(promote=False).identity(key),
        parsed(thresholds={"min_requests": 101}).identity(key),
        parsed(warm_timeout_s=5).identity(key),
        parsed(watch_after_promotion_s=5).identity(key),
        parsed(thresholds={"min_requests": 100, "max_error_rate": 0.01, "min_successes": 5}).identity(key),
        parsed(steps=[{**step, "min_successes": 5} for step in yaml.safe_load(TEXT)["steps"]]).identity(key),
        parsed(reason="").identity(key),
        parsed(attempt=2).identity(key),
    }
    assert len(others) == 11
    assert not same & others


def test_a_file_that_was_applied_before_fields_were_added_is_still_the_same_one() -> None:
    assert parsed().identity(digest("x")) == "431bceb234076bcac3400ee507f684595161fe07210af80371f7bd1be159a285"
