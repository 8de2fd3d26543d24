import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from echovlm_ray.checkpoint.inspect import inspect
from echovlm_ray.checkpoint.layout import ORGANS, InvalidCheckpointError, read_index, registry_root
from echovlm_ray.checkpoint.schema import PARTS
from tests.checkpoint.support import Edit, StateDict, make_split


def test_released_checkpoint(golden_checkpoint: Path) -> None:
    report = inspect(golden_checkpoint)
    assert report.kind == "released"
    assert report.problems == ()
    assert (report.num_layers, report.num_experts, report.num_experts_per_tok) == (4, 4, 2)
    assert report.dtypes == (("BF16",) if "bf16" in str(golden_checkpoint) else ("F32",))
    assert report.bytes_on_disk == (golden_checkpoint / "model.safetensors").stat().st_size
    parts = {part.part: part.parameters for part in report.parts}
    assert tuple(parts) == PARTS
    # By hand, from the golden config: layers × experts × three matrices.
    assert parts["routed experts"] == 4 * 4 * 3 * 64 * 48
    assert parts["gates"] == 4 * 4 * 64
    assert parts["shared experts"] == 4 * (3 * 64 * 96 + 64)
    assert parts["coefficients"] == 4 * (2 * 64 + 2)
    assert parts["dense MLP"] == 4 * 3 * 64 * 128
    assert parts["attention"] == 4 * (2 * 64 * 64 + 2 * 32 * 64 + 64 + 2 * 32)
    assert parts["norms"] == (2 * 4 + 1) * 64
    assert parts["embeddings"] == parts["lm_head"] == 1000 * 64
    assert sum(parts.values()) == report.parameters


def test_split_folder_counts_one_organs_model(base_checkpoint: Path, tmp_path: Path) -> None:
    make_split(base_checkpoint, tmp_path / "split")
    report, released = inspect(tmp_path / "split"), inspect(base_checkpoint)
    assert report.kind == "split"
    assert report.problems == ()
    assert report.parts == released.parts
    assert report.bytes_on_disk < 1.01 * released.bytes_on_disk
    assert tuple(organ.organ for organ in report.organs) == ORGANS
    assert report.routing == "organs"
    assert report.expert_set_id == read_index(tmp_path / "split").expert_set().id
    assert "all organs have the same experts, stored once" in report.notes
    backbone = inspect(tmp_path / "split" / "backbone")
    assert (backbone.kind, backbone.problems) == ("backbone", ())


def test_partition_counts_all_organs(base_checkpoint: Path, tmp_path: Path) -> None:
    make_split(base_checkpoint, tmp_path / "split", groups={"a": [0, 3], "b": [1], "c": [2]})
    report = inspect(tmp_path / "split")
    assert report.problems == ()
    assert report.parts == inspect(base_checkpoint).parts
    assert [organ.source_experts for organ in report.organs] == [(0, 3), (1,), (2,)]


def test_sharded_and_tied(broken: Edit) -> None:
    broken.config(tie_word_embeddings=True)
    broken.tensors(lambda tensors: tensors.pop("lm_head.weight"))
    broken.shard()
    report = inspect(broken.directory)
    assert (report.kind, report.problems, report.weight_files) == ("released", (), 3)
    assert "embeddings are tied" in report.notes[0]
    assert "lm_head" not in {part.part for part in report.parts}


def test_stock_model(broken: Edit) -> None:
    def without_experts(tensors: StateDict) -> None:
        for name in [name for name in tensors if ".moe." in name or ".coefficient." in name]:
            del tensors[name]

    broken.tensors(without_experts)
    broken.config(moe_intermediate_size=None, shared_expert_intermediate_size=None, num_experts=None)
    report = inspect(broken.directory)
    assert (report.kind, report.problems, report.num_experts) == ("qwen2_vl", (), None)


NORM = "model.norm.weight"
EXPERT = "model.layers.1.moe.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: tensors.pop(EXPERT), f"{EXPERT}: missing"),
        (lambda tensors: tensors.update({"model.layers.4.mlp.up_proj.weight": torch.zeros(2)}), "unexpected"),
        (lambda tensors: tensors.update({"optimizer": torch.zeros(2)}), "optimizer: unexpected"),
        (lambda tensors: tensors.update({NORM: torch.zeros(65)}), f"{NORM}: is [65], but config.json makes it [64]"),
        (lambda tensors: tensors.update({NORM: torch.zeros(64, dtype=torch.int8)}), "I8 weights are not supported"),
    ],
)
def test_wrong_tensors_are_named(broken: Edit, change: Callable[[StateDict], object], problem: str) -> None:
    broken.tensors(change)
    report = inspect(broken.directory)
    assert report.kind == "released"
    assert len(report.problems) == 1
    assert problem in report.problems[0]


def test_truncated_shard_and_missing_shard_are_named(broken: Edit) -> None:
    broken.shard()
    (broken.directory / "model-00003-of-00003.safetensors").unlink()
    path = broken.directory / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    problems = inspect(broken.directory).problems
    assert any(problem.startswith("model-00001-of-00003.safetensors: is truncated") for problem in problems)
    assert any("model-00003-of-00003.safetensors: named by" in problem for problem in problems)


def test_an_index_and_shards_that_disagree(broken: Edit) -> None:
    weight_map = broken.shard()
    files = sorted(set(weight_map.values()))
    weight_map[NORM] = files[(files.index(weight_map[NORM]) + 1) % 3]
    broken.index(weight_map)
    problems = inspect(broken.directory).problems
    assert any(f"expects {NORM} in it" in problem for problem in problems)
    assert any(f"holds {NORM}, which" in problem for problem in problems)


def test_experts_that_the_config_does_not_speak_of(broken: Edit) -> None:
    broken.config(moe_intermediate_size=None)
    assert any("moe_intermediate_size" in problem for problem in inspect(broken.directory).problems)


def test_old_weights_beside_shards(broken: Edit) -> None:
    copy = broken.weights.read_bytes()
    broken.shard()
    broken.weights.write_bytes(copy)
    assert any("remove the old one" in problem for problem in inspect(broken.directory).problems)


def test_config_is_missing_or_none(broken: Edit) -> None:
    path = broken.directory / "config.json"
    path.write_text("[1]")
    assert "must be a JSON object" in inspect(broken.directory).problems[0]
    path.write_text("{")
    assert "not JSON" in inspect(broken.directory).problems[0]
    path.unlink()
    report = inspect(broken.directory)
    assert report.kind == "unknown"
    assert "no config.json" in report.problems[0]


def test_pickles_are_never_read(broken: Edit) -> None:
    broken.weights.rename(broken.directory / "pytorch_model.bin")
    report = inspect(broken.directory)
    assert any("pickle, which is never read" in problem for problem in report.problems)


def test_damaged_split_folders(base_checkpoint: Path, tmp_path: Path) -> None:
    split = tmp_path / "split"
    make_split(base_checkpoint, split)
    largest = max((registry_root(split) / "files").iterdir(), key=lambda path: path.stat().st_size)
    largest.chmod(0o644)
    largest.write_bytes(largest.read_bytes()[:-1])
    problems = inspect(split).problems
    assert len(problems) == 7
    assert "bundle of breast" in problems[0]
    shutil.rmtree(registry_root(split))
    assert all("no bundle with the digest" in problem for problem in inspect(split).problems)
    (split / "echovlm.json").write_text("{}")
    assert "format" in inspect(split).problems[0] or "name" in inspect(split).problems[0]
    (split / "echovlm.json").unlink()
    assert "the split was not finished" in inspect(split).problems[0]


def test_bundles_of_another_backbone_are_named(broken: Edit, base_checkpoint: Path, tmp_path: Path) -> None:
    make_split(base_checkpoint, tmp_path / "one")
    broken.tensors(lambda tensors: tensors[NORM][0].add_(1))
    make_split(broken.directory, tmp_path / "two")
    index = read_index(tmp_path / "one").model_copy(update={"organs": read_index(tmp_path / "two").organs})
    (tmp_path / "two" / "echovlm.json").write_text(index.model_dump_json())
    assert "bundle of breast: it belongs to another backbone" in inspect(tmp_path / "two").problems


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpointError, match="is not a folder"):
        inspect(tmp_path / "none")
    assert inspect(tmp_path).kind == "unknown"
    assert inspect(tmp_path).problems
