import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from echovlm_ray.checkpoint.layout import (
    ORGANS,
    InvalidCheckpointError,
    backbone_directory,
    read_index,
    registry_root,
    write_index,
)
from echovlm_ray.checkpoint.merge import merge
from echovlm_ray.checkpoint.split import Labels
from experts.bundles.bundle import Bundle
from experts.bundles.layout import expert_tensor, gate_tensor
from experts.bundles.manifest import BundleDescription
from experts.bundles.writer import write_bundle
from experts.registry.registry import Registry
from tests.checkpoint.support import Edit, StateDict, bit_identical, make_split, state_dict_of


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 200_000])
def test_merging_a_split_gives_back_every_bit(
    golden_checkpoint: Path,
    tmp_path: Path,
    max_shard_bytes: int,
) -> None:
    make_split(golden_checkpoint, tmp_path / "split", max_shard_bytes=max_shard_bytes)
    merge(tmp_path / "split", tmp_path / "merged", max_shard_bytes=max_shard_bytes)
    assert bit_identical(state_dict_of(tmp_path / "merged"), state_dict_of(golden_checkpoint))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (golden_checkpoint / name).read_bytes()
    sharded = (tmp_path / "merged" / "model.safetensors.index.json").exists()
    assert sharded == (max_shard_bytes < 1_000_000)


def test_split_folder_is_the_agreed_layout(base_checkpoint: Path, tmp_path: Path) -> None:
    index = make_split(base_checkpoint, tmp_path / "split")
    assert read_index(tmp_path / "split") == index
    assert tuple(entry.organ for entry in index.organs) == ORGANS
    names = names_in(tmp_path / "split")
    files = {name for name in names if name.startswith("registry/files/")}
    # Seven copies, stored once: the experts and the gates.
    assert len(files) == 2
    assert names - files == {
        "echovlm.json",
        "backbone/config.json",
        "backbone/generation_config.json",
        "backbone/model.safetensors",
        *(f"registry/bundles/{organ}/1.0.0/manifest.json" for organ in ORGANS),
    }
    assert {path.name for path in (tmp_path).iterdir()} == {"split"}
    backbone = load_file(backbone_directory(tmp_path / "split") / "model.safetensors")
    released = load_file(base_checkpoint / "model.safetensors")
    assert set(released) - set(backbone) == {
        name for name in released if ".moe.experts." in name or name.endswith(".moe.gate.weight")
    }
    registry = Registry(registry_root(tmp_path / "split"))
    for entry in index.organs:
        bundle = registry.open(entry.bundle_digest)
        bundle.verify(finite=True)
        assert bundle.manifest.backbone_digest == index.backbone_digest
        assert bundle.manifest.source_experts == (0, 1, 2, 3)
        assert "乳腺" in bundle.manifest.organ_synonyms or entry.organ != "breast"
        for layer in range(4):
            assert torch.equal(bundle.gate_ED(layer), released[f"model.layers.{layer}.moe.gate.weight"])
            weights = bundle.load_layer(layer)
            for expert in range(4):
                name = f"model.layers.{layer}.moe.experts.{expert}.down_proj.weight"
                assert torch.equal(weights.down_EDF[expert], released[name])


def test_splitting_twice_gives_the_same_bytes(base_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_split(base_checkpoint, tmp_path / name)
    assert names_in(tmp_path / "one") == names_in(tmp_path / "two")
    for name in names_in(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_digests_do_not_depend_on_sharding(broken: Edit, base_checkpoint: Path, tmp_path: Path) -> None:
    broken.shard()
    sharded = make_split(broken.directory, tmp_path / "sharded", max_shard_bytes=300_000)
    assert sharded.backbone_digest == make_split(base_checkpoint, tmp_path / "single").backbone_digest


def test_another_backbone_has_another_digest(broken: Edit, base_checkpoint: Path, tmp_path: Path) -> None:
    broken.tensors(lambda tensors: tensors["model.norm.weight"][0].add_(1))
    changed = make_split(broken.directory, tmp_path / "changed")
    assert changed.backbone_digest != make_split(base_checkpoint, tmp_path / "same").backbone_digest


def test_tied_embeddings_need_no_head(broken: Edit, tmp_path: Path) -> None:
    broken.config(tie_word_embeddings=True)
    broken.tensors(lambda tensors: tensors.pop("lm_head.weight"))
    make_split(broken.directory, tmp_path / "split")
    merge(tmp_path / "split", tmp_path / "merged")
    assert bit_identical(state_dict_of(tmp_path / "merged"), state_dict_of(broken.directory))


def test_gates_may_have_another_dtype(broken: Edit, tmp_path: Path) -> None:
    def to_bfloat16(tensors: StateDict) -> None:
        for name in tensors:
            if ".moe.experts." in name:
                tensors[name] = tensors[name].to(torch.bfloat16)

    broken.tensors(to_bfloat16)
    make_split(broken.directory, tmp_path / "split", groups={"a": [1, 3], "b": [0, 2]})
    merge(tmp_path / "split", tmp_path / "merged")
    assert bit_identical(state_dict_of(tmp_path / "merged"), state_dict_of(broken.directory))


def test_experts_of_several_dtypes_are_refused(broken: Edit, tmp_path: Path) -> None:
    name = "model.layers.2.moe.experts.1.up_proj.weight"
    broken.tensors(lambda tensors: tensors.update({name: tensors[name].to(torch.bfloat16)}))
    with pytest.raises(InvalidCheckpointError, match=r"routed experts have several dtypes \(BF16, F32\)"):
        make_split(broken.directory, tmp_path / "split")


def test_companions_go_along_and_code_does_not(broken: Edit, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "modeling_echovlm.py", "x.pkl"):
        (broken.directory / name).write_text(name)
    make_split(broken.directory, tmp_path / "split")
    merge(tmp_path / "split", tmp_path / "merged")
    expected = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "preprocessor_config.json",
    }
    assert names_in(tmp_path / "split" / "backbone") == expected
    assert names_in(tmp_path / "merged") == expected


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(owners=st.lists(st.sampled_from(["liver", "heart", "breast"]), min_size=4, max_size=4), order=st.randoms())
def test_any_partition_merges_to_what_was_split(
    base_checkpoint: Path,
    tmp_path: Path,
    owners: list[str],
    order: random.Random,
) -> None:
    experts = list(range(4))
    order.shuffle(experts)
    groups: dict[str, list[int]] = {}
    for expert in experts:
        groups.setdefault(owners[expert], []).append(expert)
    for name in ("split", "merged"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    index = make_split(base_checkpoint, tmp_path / "split", groups=groups)
    assert index.routing == "flat"
    assert [entry.organ for entry in index.organs] == list(groups)
    registry = Registry(registry_root(tmp_path / "split"))
    gate = load_file(base_checkpoint / "model.safetensors")["model.layers.1.moe.gate.weight"]
    for entry in index.organs:
        bundle = registry.open(entry.bundle_digest)
        assert bundle.manifest.source_experts == tuple(sorted(groups[entry.organ]))
        assert torch.equal(bundle.gate_ED(1), gate[sorted(groups[entry.organ])])
    merge(tmp_path / "split", tmp_path / "merged")
    assert bit_identical(state_dict_of(tmp_path / "merged"), state_dict_of(base_checkpoint))


# --- organs that went their own ways -----------------------------------------------------------------------------


Change = Callable[[str, torch.Tensor], torch.Tensor]


def train(
    split: Path,
    organ: str,
    change: Callable[[str, torch.Tensor], torch.Tensor],
    version: str = "1.1.0",
    **fields: object,
) -> None:
    """Pushes a changed bundle of an organ and makes the index name it, as a new release of the checkpoint would."""
    index = read_index(split)
    registry = Registry(registry_root(split))
    old = registry.open(index.entry(organ).bundle_digest)
    tensors: StateDict = {}
    for path in old.locations.values():
        tensors |= load_file(path)
    content = old.manifest.model_dump(exclude={"format", "files"})
    description = BundleDescription.model_validate(content | {"version": version} | fields)
    work = split.parent / f"{organ}-{version}"
    write_bundle(work, description, lambda name: change(name, tensors[name]) if name in tensors else tensors[name])
    manifest = registry.push(work)
    organs = tuple(
        entry.model_copy(update={"version": version, "bundle_digest": manifest.digest})
        if entry.organ == organ
        else entry
        for entry in index.organs
    )
    write_index(split, index.model_copy(update={"organs": organs}))


def add_one(only: str) -> Change:
    return lambda name, tensor: tensor + 1 if name == only else tensor


def test_copies_that_differ_are_refused_naming_the_organs_and_the_tensor(base_checkpoint: Path, tmp_path: Path) -> None:
    make_split(base_checkpoint, tmp_path / "split")
    changed = expert_tensor(2, 1, "up")
    train(tmp_path / "split", "liver", add_one(changed))
    train(tmp_path / "split", "heart", add_one(gate_tensor(3)))
    with pytest.raises(InvalidCheckpointError) as raised:
        merge(tmp_path / "split", tmp_path / "merged")
    text = str(raised.value)
    assert "heart, liver differ from breast, first heart in layers.3.gate.weight (gate.safetensors)" in text
    assert "--organ" in text
    assert not (tmp_path / "merged").exists()


def test_copies_that_were_only_stored_anew_agree(
    base_checkpoint: Path,
    tmp_path: Path,
) -> None:
    make_split(base_checkpoint, tmp_path / "split")
    train(tmp_path / "split", "liver", lambda name, tensor: tensor)
    merge(tmp_path / "split", tmp_path / "merged")
    assert bit_identical(state_dict_of(tmp_path / "merged"), state_dict_of(base_checkpoint))


def test_one_organs_model_can_be_exported(
    base_checkpoint: Path,
    tmp_path: Path,
) -> None:
    make_split(base_checkpoint, tmp_path / "split")
    train(tmp_path / "split", "liver", add_one(expert_tensor(2, 1, "up")))
    released = state_dict_of(base_checkpoint)
    merge(tmp_path / "split", tmp_path / "breast", organ="breast")
    merge(tmp_path / "split", tmp_path / "old-liver", organ="liver", version="1.0.0")
    assert bit_identical(state_dict_of(tmp_path / "breast"), released)
    assert bit_identical(state_dict_of(tmp_path / "old-liver"), released)
    merge(tmp_path / "split", tmp_path / "liver", organ="liver")
    liver = state_dict_of(tmp_path / "liver")
    name = "model.layers.2.moe.experts.1.up_proj.weight"
    assert torch.equal(liver.pop(name), released.pop(name) + 1)
    assert bit_identical(liver, released)


def test_an_organ_with_fewer_experts_is_exported_with_its_own_config(base_checkpoint: Path, tmp_path: Path) -> None:
    make_split(base_checkpoint, tmp_path / "split")
    train(
        tmp_path / "split",
        "liver",
        lambda name, tensor: tensor[:3].clone() if ".gate.weight" in name else tensor,
        num_experts=3,
        source_experts=(0, 2, 3),
    )
    with pytest.raises(InvalidCheckpointError, match="liver differ from breast"):
        merge(tmp_path / "split", tmp_path / "merged")
    merge(tmp_path / "split", tmp_path / "liver", organ="liver")
    config = json.loads((tmp_path / "liver" / "config.json").read_text())
    assert config["num_experts"] == 3
    assert {**config, "num_experts": 4} == json.loads((base_checkpoint / "config.json").read_text())
    names = state_dict_of(tmp_path / "liver").keys()
    assert {name.split(".")[5] for name in names if ".moe.experts." in name} == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("organ", "version", "reason"),
    [
        ("spleen", None, "no organ 'spleen'"),
        ("breast", "9.9.9", "no version '9.9.9'"),
        (None, "1.0.0", "add --organ"),
    ],
)
def test_what_is_not_there_cannot_be_exported(
    base_checkpoint: Path, tmp_path: Path, organ: str | None, version: str | None, reason: str
) -> None:
    make_split(base_checkpoint, tmp_path / "split", organs=("breast",))
    with pytest.raises(InvalidCheckpointError, match=reason):
        merge(tmp_path / "split", tmp_path / "merged", organ=organ, version=version)


def test_one_organ_of_a_partition_is_no_model(base_checkpoint: Path, tmp_path: Path) -> None:
    make_split(base_checkpoint, tmp_path / "split", groups={"a": [0, 1], "b": [2, 3]})
    with pytest.raises(InvalidCheckpointError, match="a alone is no model"):
        merge(tmp_path / "split", tmp_path / "merged", organ="a")


# --- damage ------------------------------------------------------------------------------------------------------


def test_a_backbone_that_changed_since_the_split_is_refused(base_checkpoint: Path, tmp_path: Path) -> None:
    make_split(base_checkpoint, tmp_path / "split")
    path = backbone_directory(tmp_path / "split") / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InvalidCheckpointError, match="has changed since the split"):
        merge(tmp_path / "split", tmp_path / "merged")
    assert {entry.name for entry in tmp_path.iterdir()} == {"split"}


def test_one_flipped_bit_in_the_registry_is_found(base_checkpoint: Path, tmp_path: Path) -> None:
    make_split(base_checkpoint, tmp_path / "split")
    path = max((registry_root(tmp_path / "split") / "files").iterdir(), key=lambda path: path.stat().st_size)
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidCheckpointError, match="damaged"):
        merge(tmp_path / "split", tmp_path / "merged")


def test_a_missing_bundle_is_named(base_checkpoint: Path, tmp_path: Path) -> None:
    make_split(base_checkpoint, tmp_path / "split")
    shutil.rmtree(registry_root(tmp_path / "split") / "bundles" / "kidney")
    with pytest.raises(InvalidCheckpointError, match=r"bundle of kidney: .*no bundle with the digest"):
        merge(tmp_path / "split", tmp_path / "merged")


# --- refusals before anything is written -------------------------------------------------------------------------


def test_sources_that_cannot_be_split(base_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpointError, match="is not a folder"):
        make_split(tmp_path / "none", tmp_path / "split")
    make_split(base_checkpoint, tmp_path / "done")
    with pytest.raises(InvalidCheckpointError, match="is split already"):
        make_split(tmp_path / "done", tmp_path / "split")
    with pytest.raises(InvalidCheckpointError, match=r"moe\.gate\.weight: missing"):
        make_split(tmp_path / "done" / "backbone", tmp_path / "split")
    assert not (tmp_path / "split").exists()


def test_a_stock_model_has_nothing_to_split(broken: Edit, tmp_path: Path) -> None:
    def without_experts(tensors: StateDict) -> None:
        for name in [name for name in tensors if ".moe." in name or ".coefficient." in name]:
            del tensors[name]

    broken.tensors(without_experts)
    broken.config(moe_intermediate_size=None, shared_expert_intermediate_size=None, num_experts=None)
    with pytest.raises(InvalidCheckpointError, match="stock Qwen2-VL: it has no experts"):
        make_split(broken.directory, tmp_path / "split")


@pytest.mark.parametrize("destination", ["full", "file"])
def test_nothing_is_overwritten(base_checkpoint: Path, tmp_path: Path, destination: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidCheckpointError, match=r"not empty|not a folder"):
        make_split(base_checkpoint, tmp_path / destination)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    assert names_in(tmp_path) == {"full/mine.txt", "file"}


def test_an_empty_folder_may_be_filled(base_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "split").mkdir()
    make_split(base_checkpoint, tmp_path / "split", organs=("breast",))
    assert read_index(tmp_path / "split").organs[0].organ == "breast"


@pytest.mark.parametrize(
    ("labels", "field"), [(Labels(name="x", version="one"), "version"), (Labels(name="x" * 300), "name")]
)
def test_labels_are_checked_before_anything_is_written(
    base_checkpoint: Path, tmp_path: Path, labels: Labels, field: str
) -> None:
    with pytest.raises(InvalidCheckpointError, match=field):
        make_split(base_checkpoint, tmp_path / "split", labels=labels)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_has_a_name() -> None:
    with pytest.raises(InvalidCheckpointError, match="name"):
        Labels(name="")


def test_a_bundle_stands_alone(base_checkpoint: Path, tmp_path: Path) -> None:
    """A bundle written from a split one opens from its own folder too: what `experts` tools exchange."""
    make_split(base_checkpoint, tmp_path / "split", organs=("breast",))
    train(tmp_path / "split", "breast", lambda name, tensor: tensor)
    Bundle.open(tmp_path / "breast-1.1.0").verify()
