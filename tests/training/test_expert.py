"""Training of one organ's experts: trained parameters, cached embeddings, and the resulting bundle."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from echovlm_ray.checkpoint.groups import Groups, clone_groups
from echovlm_ray.checkpoint.split import Labels, split
from echovlm_ray.cli.main import app
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.training.batches import collate
from echovlm_ray.training.encode import FreshlyEncoded
from echovlm_ray.training.example_cache import CachedExamples, cache_examples
from echovlm_ray.training.expert import next_version
from echovlm_ray.training.objective import TrainingObjective
from echovlm_ray.training.recipe import DataSection
from echovlm_ray.training.recipe_file import write_recipe
from echovlm_ray.training.record_source import RecordSource
from echovlm_ray.training.sources import DataFiles, open_sources
from echovlm_ray.training.start import save_model
from experts.bundles.bundle import Bundle
from experts.registry.registry import Registry
from router.gating.expert_set import Routing
from tests.training.support import encoder_of, recipe, tiny_model, write_records

STAGE = {
    "name": "experts",
    "train": ["gates", "experts"],
    "steps": 8,
    "batch_size": 4,
    "micro_batch_size": 2,
    "learning_rate": 1e-2,
}
ORGANS = ("breast", "liver")


def split_checkpoint(folder: Path, start: Path, routing: Routing = "organs") -> Path:
    save_model(tiny_model(start), start, folder / "released", dtype=torch.float32)
    groups: dict[Routing, Callable[[int], Groups]] = {
        "organs": lambda count: clone_groups(ORGANS, count),
        "flat": lambda count: {"breast": (0, 1), "liver": (2, 3)},
    }
    labels = Labels(name="tiny", authors="A", license="Apache-2.0")
    split(folder / "released", folder / "split", groups=groups[routing], routing=routing, labels=labels)
    return folder / "split"


def command(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def train_expert(*arguments: object) -> Any:
    return command("train", "expert", *arguments, "--device", "cpu", "--threads", "1", "--quiet")


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def trained(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `split/`, `records/` and a finished `run/`."""
    folder = tmp_path_factory.mktemp("expert")
    split_checkpoint(folder, start)
    before = digests(folder / "split")
    records = write_records(folder / "records", 12, without_image=(3,))
    data = {"max_tokens": 512, "max_visual_tokens": 16, "validation_share": 0.25}
    write_recipe(folder / "recipe.yaml", recipe(stages=[STAGE], data=data))
    options = ["--organ", "breast", "--checkpoint", folder / "split", "--data", records]
    done = train_expert(*options, "--output", folder / "run", "--recipe", folder / "recipe.yaml")
    assert done.exit_code == 0, done.stderr
    assert f"Next: echoray experts push {folder / 'run' / 'breast-1.1.0'}" in done.stdout
    assert digests(folder / "split") == before
    return folder


def test_the_bundle_is_whole_and_passes_its_own_test(trained: Path) -> None:
    bundle = trained / "run" / "breast-1.1.0"
    done = command("experts", "verify", bundle, "--checkpoint", trained / "split", "--kernel", "reference")
    assert done.exit_code == 0, done.stderr
    manifest = Bundle.open(bundle).manifest
    assert manifest.probe is not None
    assert manifest.has_prototype
    assert re.match("9 records, [89] of them with pictures", manifest.training_data)
    assert (manifest.version, manifest.authors) == ("1.1.0", "A")
    assert list(manifest.changelog) == ["1.0.0", "1.1.0"]
    metrics = manifest.eval_metrics
    assert metrics["answer_loss"] < metrics["before_answer_loss"]
    assert metrics["tokens"] > 0
    card = (trained / "run" / "MODEL_CARD.md").read_text()
    division = "3 of 12 records were kept back, divided by id, so images of one patient can be on both sides."
    assert division in manifest.training_data
    assert f"`before` is the version that training started from. {division}" in card
    assert manifest.digest in card
    assert "not a medical device" in card


def test_experts_and_gates_moved_and_nothing_else_did(trained: Path, start: Path) -> None:
    bundle = Bundle.open(trained / "run" / "breast-1.1.0")
    registry = Registry(trained / "split" / "registry")
    base = registry.open(registry.find("breast", "1.0.0").digest)
    assert bundle.manifest.backbone_digest == base.manifest.backbone_digest
    for layer in range(2):
        assert not torch.equal(bundle.gate_ED(layer), base.gate_ED(layer))
        assert not torch.equal(bundle.load_layer(layer).down_EDF, base.load_layer(layer).down_EDF)


def test_the_prototype_is_the_direction_of_the_pooled_features(trained: Path, start: Path) -> None:
    model = EchoVLMForConditionalGeneration.from_pretrained(trained / "released")
    prototype = Bundle.open(trained / "run" / "breast-1.1.0").prototype()
    assert prototype is not None
    files = DataFiles(train=(trained / "records" / "train.json",))
    learnt, *_ = open_sources(files, DataSection(validation_share=0.25), seed=0)
    encoder, pooled = encoder_of(start), []
    for index in range(len(learnt)):
        for item in encoder.encode(learnt.example(index, 0)).vision:
            with torch.no_grad():
                output = model.model.visual(torch.from_numpy(item.patches), grid_thw=torch.tensor([item.grid]))
            pooled.append(torch.nn.functional.normalize(output.pooler_output.mean(dim=0), dim=0))
    torch.testing.assert_close(prototype, torch.stack(pooled).mean(dim=0))


def test_kept_embeddings_give_the_loss_of_the_pictures_themselves(trained: Path, start: Path) -> None:
    model = EchoVLMForConditionalGeneration.from_pretrained(trained / "released")
    source = FreshlyEncoded(RecordSource(trained / "records" / "train.json"), encoder_of(start))
    counted: list[int] = []
    assert (
        cache_examples(source, model.model.visual, trained / "kept", skip_unusable=False, progress=counted.append) == 0
    )
    assert sum(counted) == 12
    kept = CachedExamples(source, trained / "kept")
    objective = TrainingObjective(model, balancing=0.1).eval()
    for indices in ((0, 3, 5), (3,)):
        with torch.no_grad():
            fresh = objective(**collate([source.encoded(index, 0) for index in indices]))["loss"]
            found = objective(**collate([kept.encoded(index, 0) for index in indices]))["loss"]
        torch.testing.assert_close(found, fresh)


def test_what_cannot_be_kept_is_counted_and_named(
    trained: Path, start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = EchoVLMForConditionalGeneration.from_pretrained(trained / "released")
    records = write_records(tmp_path, 3)
    (tmp_path / "train.json-1.png").unlink()
    source = FreshlyEncoded(RecordSource(records), encoder_of(start))
    assert cache_examples(source, model.model.visual, tmp_path / "kept", skip_unusable=True) == 1
    reason = f"{records}, line 1: image 1 of 1 does not exist below the image root"
    assert [each.getMessage() for each in caplog.records] == [f"skipped, 1 so far: {reason}"]


def test_pictures_are_read_once(trained: Path, start: Path, tmp_path: Path) -> None:
    # What is kept is enough to go on: the pictures may be gone by then.
    records = write_records(tmp_path / "records", 8)
    options = ["--organ", "liver", "--checkpoint", trained / "split", "--data", records, "--output", tmp_path / "run"]
    stage = {**STAGE, "steps": 2}
    data = {"max_tokens": 512, "max_visual_tokens": 16}
    write_recipe(tmp_path / "recipe.yaml", recipe(stages=[stage], data=data))
    (tmp_path / "records" / "train.json-7.png").rename(tmp_path / "last.png")
    done = train_expert(*options, "--recipe", tmp_path / "recipe.yaml")
    assert done.exit_code == 1
    assert "train.json, line 1: image 1 of 1 does not exist below the image root" in " ".join(done.stderr.split())
    (tmp_path / "last.png").rename(tmp_path / "records" / "train.json-7.png")
    for number in range(7):
        (tmp_path / "records" / f"train.json-{number}.png").unlink()
    done = train_expert("--resume", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    assert Bundle.open(tmp_path / "run" / "liver-1.1.0").manifest.eval_metrics == {}


def test_it_starts_from_a_version_of_the_registry(trained: Path, tmp_path: Path) -> None:
    Registry(trained / "split" / "registry").push(trained / "run" / "breast-1.1.0")
    stage = {**STAGE, "steps": 1, "learning_rate": 1e-9, "weight_decay": 0.0}
    data = {"max_tokens": 512, "max_visual_tokens": 16}
    write_recipe(tmp_path / "recipe.yaml", recipe(stages=[stage], data=data))
    options = ["--organ", "breast", "--checkpoint", trained / "split", "--base", "1.1.0"]
    records = trained / "records" / "train.json"
    done = train_expert(*options, "--data", records, "--output", tmp_path / "r", "--recipe", tmp_path / "recipe.yaml")
    assert done.exit_code == 0, done.stderr
    made, base = Bundle.open(tmp_path / "r" / "breast-1.2.0"), Bundle.open(trained / "run" / "breast-1.1.0")
    torch.testing.assert_close(made.load_layer(1).up_EFD, base.load_layer(1).up_EFD, rtol=0, atol=1e-6)


def test_what_cannot_be_trained_is_refused(trained: Path, start: Path, tmp_path: Path) -> None:
    records = trained / "records" / "train.json"
    flat = split_checkpoint(tmp_path, start, "flat")
    common = ["--data", records, "--output", tmp_path / "run"]
    for arguments, code, problem in (
        (["--organ", "breast", "--checkpoint", flat], 2, "one organ's cannot be trained alone"),
        (["--organ", "heart", "--checkpoint", trained / "split"], 2, "has no organ 'heart'"),
        (["--organ", "breast", "--checkpoint", trained / "split", "--recipe", "paper"], 2, "trains more than gates"),
        (["--organ", "breast", "--checkpoint", trained / "split", "--version", "two"], 2, "no semantic version"),
        (
            ["--organ", "breast", "--checkpoint", trained / "split", "--version", "1.0.0"],
            2,
            "give a later one, like 1.1.0",
        ),
        (
            ["--organ", "breast", "--checkpoint", trained / "split", "--version", "0.9.0"],
            2,
            "does not come after 1.0.0",
        ),
        (["--organ", "breast", "--checkpoint", trained / "split", "--base", "9.9.9"], 2, "9.9.9"),
        (["--organ", "breast"], 2, "needs --organ and --checkpoint"),
    ):
        done = train_expert(*common, *arguments)
        assert (done.exit_code, problem in " ".join(done.stderr.split())) == (code, True), done.stderr
    assert not (tmp_path / "run").exists()


def test_versions_follow_one_another() -> None:
    assert [next_version(each) for each in ("1.0.0", "1.0.7", "0.9.1-rc.1")] == ["1.1.0", "1.1.0", "0.10.0"]
