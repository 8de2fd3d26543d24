"""A gate's figures from a real router: what it asks, whom it asks, and which datasets it refuses."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gate_system import GateSystem, gate_system
from echovlm_ray.checkpoint.layout import registry_root
from echovlm_ray.cli.main import app
from echovlm_ray.evaluation import asking
from echovlm_ray.evaluation.settings import RequestLimits
from echovlm_ray.serving.gates import questions
from experts.bundles.writer import write_bundle
from experts.registry.registry import Registry
from router.rollouts.gates import EvaluationInterruptedError, Gate, GateRun, UnusableGateError, decide
from tests.changed_bundles import changed_bundle, changed_description

ORGAN = "liver"


@pytest.fixture(scope="module")
def checkpoint(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, whose registry gets further versions."""
    directory = tmp_path_factory.mktemp("gates") / "demo"
    shutil.copytree(demo_checkpoint, directory, copy_function=os.link)
    return directory


@pytest.fixture(scope="module")
def versions(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Equal weights, weights that know nothing, and another organ's bundle under this organ's name."""
    folder = tmp_path_factory.mktemp("versions")
    registry = Registry(registry_root(checkpoint))
    stable = registry.open(registry.find(ORGAN, "1.0.0").digest)
    kidney = registry.open(registry.find("kidney", "1.0.0").digest)
    changed_bundle(folder / "equal", stable, "1.0.1", lambda tensor: tensor)
    changed_bundle(folder / "mute", stable, "1.0.2", torch.zeros_like)
    write_bundle(folder / "relabelled", changed_description(kidney, "1.0.3", organ=ORGAN), kidney.tensor)
    return {name: registry.push(folder / name).digest for name in ("equal", "mute", "relabelled")}


@pytest.fixture(scope="module")
def system(checkpoint: Path, versions: dict[str, str]) -> Iterator[GateSystem]:
    with gate_system(checkpoint, questions_per_s=1000) as system:
        yield system


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "held"
    options = ["--organ", "liver,kidney", "--count", "12", "--seed", "92001", "--language", "en", "--task", "report"]
    app(["data", "phantom", str(folder), *options], standalone_mode=False)
    return folder


@pytest.fixture
def dataset(phantoms: Path, tmp_path: Path) -> Path:
    """A copy of its own."""
    shutil.copytree(phantoms, tmp_path / "held")
    return tmp_path / "held" / "records.json"


def gate_of(records: Path, **fields: Any) -> Gate:
    demanded = {"metric": "attribute_f1", "organ": ORGAN, "at_least": 0.8, "not_below_incumbent_by": 0.01}
    return Gate.model_validate({"dataset": str(records), **demanded, **fields})


def run_of(system: GateSystem, gate: Gate, digest: str) -> GateRun:
    return GateRun(gate, digest, system.stable[ORGAN], threading.Event(), lambda answered, questions: None)


@pytest.mark.parametrize(("name", "passed"), [("equal", True), ("mute", False), ("relabelled", False)])
def test_an_equal_version_passes_and_a_worse_one_does_not(
    system: GateSystem, versions: dict[str, str], dataset: Path, name: str, passed: bool
) -> None:
    system.offer(ORGAN, versions[name])
    gate = system.evaluator.declare(gate_of(dataset))
    seen: list[tuple[int, int]] = []
    run = GateRun(gate, versions[name], system.stable[ORGAN], threading.Event(), lambda *far: seen.append(far))
    evidence = system.evaluator.evaluate(run)
    assert decide(gate, evidence).passed == passed
    records = evidence.records
    assert 0 < records < 12
    assert evidence.dataset_digest == gate.dataset_digest
    assert evidence.comparison is not None
    assert evidence.comparison.incumbent_digest == system.stable[ORGAN]
    assert evidence.comparison.incumbent_value > 0.8
    assert (evidence.comparison.difference == 0) == passed
    # Both versions were asked every record, and nothing of it is evidence of traffic.
    assert seen[-1] == (2 * records, 2 * records)
    assert system.router.outcomes.take() == ([], [])
    assert system.router.engine.queue_length == 0


def test_experts_under_another_name_answer_where_the_organ_is_given(
    system: GateSystem, versions: dict[str, str], dataset: Path
) -> None:
    # All organs of the demo have the same experts at first; what is wrong is by which pictures they are found.
    system.offer(ORGAN, versions["relabelled"])
    gate = system.evaluator.declare(gate_of(dataset, organs="given"))
    assert decide(gate, system.evaluator.evaluate(run_of(system, gate, versions["relabelled"]))).passed


def test_a_cancelled_evaluation_ends_at_once_and_leaves_nothing(
    system: GateSystem, versions: dict[str, str], dataset: Path
) -> None:
    system.offer(ORGAN, versions["equal"])
    gate = system.evaluator.declare(gate_of(dataset))
    run = GateRun(gate, versions["equal"], system.stable[ORGAN], threading.Event(), lambda *far: run.cancelled.set())
    with pytest.raises(EvaluationInterruptedError):
        system.evaluator.evaluate(run)
    assert system.router.engine.queue_length == 0


def test_too_little_time_for_questions_is_a_reason_to_try_again(
    system: GateSystem, versions: dict[str, str], dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system.offer(ORGAN, versions["equal"])
    gate = system.evaluator.declare(gate_of(dataset))
    monkeypatch.setattr(questions, "REQUEST_LIMITS", RequestLimits(concurrency=1, timeout_s=0.01, retry_s=60))
    monkeypatch.setattr(asking, "TRIES", 1)
    with pytest.raises(EvaluationInterruptedError, match="DeadlineExceededError"):
        system.evaluator.evaluate(run_of(system, gate, versions["equal"]))


def emptied(records: Path) -> None:
    records.write_text("[]")


def gone(records: Path) -> None:
    records.unlink()


def broken(records: Path) -> None:
    records.write_text(records.read_text()[:-20])


def images_of(records: Path) -> list[Path]:
    """The first picture of each record of the organ."""
    found = [record["image"] for record in json.loads(records.read_text()) if record["organ"] == ORGAN]
    return [records.parent / (image if isinstance(image, str) else image[0]) for image in found]


def without_image(records: Path) -> None:
    images_of(records)[0].unlink()


def of_another_organ(records: Path) -> None:
    found = [record for record in json.loads(records.read_text()) if record["organ"] != ORGAN]
    records.write_text(json.dumps(found))


def without_truth(records: Path) -> None:
    found = json.loads(records.read_text())
    for record in found:
        del record["attributes"]
    records.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (emptied, "cannot be used|has 0 records"),
        (gone, "is no file on Control's machine"),
        (broken, "cannot be used"),
        (without_image, "an image does not exist"),
        (of_another_organ, "none of 'liver'"),
        (without_truth, "attribute_f1 of liver cannot be computed"),
    ],
)
def test_bad_datasets_are_refused_when_declared_and_when_asked(
    system: GateSystem, versions: dict[str, str], dataset: Path, spoil: Callable[[Path], None], text: str
) -> None:
    declared = system.evaluator.declare(gate_of(dataset))
    spoil(dataset)
    with pytest.raises(UnusableGateError, match=text):
        system.evaluator.declare(gate_of(dataset))
    with pytest.raises(UnusableGateError):
        system.evaluator.evaluate(run_of(system, declared, versions["equal"]))


def test_a_changed_record_or_image_is_found(system: GateSystem, versions: dict[str, str], dataset: Path) -> None:
    declared = system.evaluator.declare(gate_of(dataset))
    first, *_, last = images_of(dataset)
    shutil.copy(last, first)
    assert system.evaluator.declare(gate_of(dataset)).dataset_digest != declared.dataset_digest
    with pytest.raises(UnusableGateError, match=r"has changed: its records and images have the digest"):
        system.evaluator.evaluate(run_of(system, declared, versions["equal"]))
    with pytest.raises(UnusableGateError, match="has changed"):
        system.evaluator.declare(declared)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"metric": "bleu"}, "there is no metric 'bleu': choose one of attribute_f1, all_attributes_right"),
        ({"metric": "vqa_accuracy"}, "cannot be computed"),
        ({"dataset": "held/records.json"}, "no absolute path"),
        ({"dataset": "/dev/zero"}, "is no file"),
    ],
)
def test_gates_that_cannot_be_evaluated_are_refused(
    system: GateSystem, dataset: Path, fields: dict[str, str], text: str
) -> None:
    with pytest.raises(UnusableGateError, match=text):
        system.evaluator.declare(gate_of(dataset, **fields))
