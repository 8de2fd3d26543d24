from pathlib import Path

import pytest
import yaml

from tests.cli.calls import done, done_json, invoke, refused
from tests.cli.control_server import System
from tests.router.rollouts.gate_support import write_scores
from tests.waiting import until


@pytest.fixture
def dataset(system: System) -> Path:
    """Scores of both versions of heart: the newer one is better."""
    path = system.directory / "held.json"
    write_scores(path, **{system.digests["heart", "1.0.0"]: 0.8, system.digests["heart", "1.1.0"]: 0.9})
    return path


def gates_file(dataset: Path, at_least: float, **fields: object) -> Path:
    gate = {"dataset": str(dataset), "metric": "attribute_f1", "organ": "heart", "at_least": at_least, **fields}
    path = dataset.with_name("gates.yaml")
    path.write_text(yaml.safe_dump({"gates": [gate]}))
    return path


def last_entry(system: System, action: str) -> dict[str, object]:
    history = done_json(system, "history", "heart")
    return next(entry for entry in reversed(history["entries"]) if entry["event"] == action)


def test_promote_with_gates_waits_for_them_and_goes_on_by_itself(system: System, dataset: Path) -> None:
    done(system, "stage", "heart", "1.1.0", "--wait")
    text = done(system, "promote", "heart", "--gates", gates_file(dataset, 0.85, not_below_incumbent_by=0.01), "--wait")
    assert "attribute_f1 of heart must be at least 0.85 and not below the incumbent by more than 0.01" in text
    assert "heart 1.1.0 is stable." in text


def test_canary_with_gates_begins_once_they_are_passed(system: System, dataset: Path) -> None:
    done(system, "stage", "heart", "1.1.0", "--wait")
    system.evaluator.proceed.clear()
    asked = done(system, "canary", "heart", "--percent", 5, "--gates", gates_file(dataset, 0.85))
    assert "it answers 5 % of the requests by itself once it has passed" in asked
    assert system.rollout().state == "warm"
    assert "has not passed its gates yet" in refused(system, "canary", "heart", "--percent", 5, code=1)
    system.evaluator.proceed.set()
    assert system.reach("canary").percent == 5


def test_a_promotion_that_fails_its_gates_is_refused_with_the_figures(system: System, dataset: Path) -> None:
    done(system, "stage", "heart", "1.1.0", "--wait")
    result = invoke(system, "promote", "heart", "--gates", gates_file(dataset, 0.95), "--wait")
    assert result.exit_code == 1
    assert "heart 1.1.0 did not pass its gates: attribute_f1 of heart is 0.900 [0.800, 1.000]" in result.stderr
    assert "it must be at least 0.95" in result.stderr
    assert "--override --reason TEXT" in result.stderr
    for operation in (("promote", "heart"), ("canary", "heart", "--percent", "5")):
        assert "attribute_f1 of heart is 0.900" in refused(system, *operation, code=1)
    assert system.rollout().state == "warm"


def test_an_override_needs_a_reason_and_stands_in_the_history(system: System, dataset: Path) -> None:
    done(system, "stage", "heart", "1.1.0", "--wait")
    done(system, "promote", "heart", "--gates", gates_file(dataset, 0.95))
    until(lambda: bool(done_json(system, "list")["rollouts"][0]["gates"][0]["evaluation"]))
    for reason in ((), ("--reason", " ")):
        assert "--override needs --reason" in refused(system, "promote", "heart", "--override", *reason, code=2)
        assert "--override needs --reason" in refused(
            system, "canary", "heart", "--percent", 5, "--override", *reason, code=2
        )
    both = ("--gates", gates_file(dataset, 0.95), "--override", "--reason", "x")
    assert "exclude each other" in refused(system, "promote", "heart", *both, code=2)
    assert system.rollout().state == "warm"
    done(system, "promote", "heart", "--override", "--reason", "the board saw the images", "--wait")
    entry = last_entry(system, "promote")
    assert entry["reason"] == "the board saw the images"
    details = entry["details"]
    assert isinstance(details, dict)
    assert "attribute_f1 of heart is 0.900" in details["override"]["not_passed"][0]


def test_show_lists_the_evaluations_of_a_version(system: System, dataset: Path) -> None:
    options = ("--registry", system.directory / "registry")
    done(system, "stage", "heart", "1.1.0", "--wait")
    assert "No evaluation of it is known to Control." in done(system, "show", "heart@1.1.0", *options)
    done(system, "promote", "heart", "--gates", gates_file(dataset, 0.85, not_below_incumbent_by=0.01), "--wait")
    shown = done(system, "show", "heart@1.1.0", *options)
    assert "heart-2 yes attribute_f1 of heart is 0.900" in shown
    (found,) = done_json(system, "show", "heart@1.1.0", *options)["evaluations"]
    assert (found["value"], found["incumbent_value"], found["records"]) == (0.9, 0.8, 10)
    assert found["passed"]
    assert found["incumbent_digest"] == system.digests["heart", "1.0.0"]
    assert done_json(system, "show", "heart@1.0.0", *options)["evaluations"] == []


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("gates: []", "gates"),
        ("steps: []", "steps"),
        ("gates: [{dataset: /d, metric: attribute_f1, organ: heart}]", "at_least, not_below_incumbent_by, or both"),
        ("gates: [{dataset: /d, metrik: attribute_f1, organ: heart, at_least: 0.5}]", "metric"),
        ("gates: [{dataset: /d, metric: attribute_f1, organ: heart, at_least: 1.5}]", "at_least"),
        ("gates: {", "gates.yaml"),
    ],
)
def test_a_file_of_gates_that_cannot_be_used_is_refused(system: System, content: str, text: str) -> None:
    path = system.directory / "gates.yaml"
    path.write_text(content)
    done(system, "stage", "heart", "1.1.0", "--wait")
    result = invoke(system, "promote", "heart", "--gates", path)
    assert result.exit_code == 2
    assert text in result.stderr
    assert system.rollout().state == "warm"


def test_a_dataset_that_is_gone_is_refused_before_anything_changes(system: System, dataset: Path) -> None:
    file = gates_file(dataset, 0.85)
    dataset.unlink()
    done(system, "stage", "heart", "1.1.0", "--wait")
    assert "gates[0]: the dataset" in refused(system, "promote", "heart", "--gates", file, code=2)
    assert "gate" not in [entry["event"] for entry in done_json(system, "history", "heart")["entries"]]
