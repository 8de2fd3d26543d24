import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from echovlm_ray.checkpoint.bundle_card import BundleCard, read_card
from echovlm_ray.checkpoint.layout import InvalidCheckpointError, read_index, registry_root
from echovlm_ray.checkpoint.pack import PackOptions, pack
from echovlm_ray.checkpoint.schema import is_routed
from experts.bundles.bundle import Bundle
from experts.bundles.layout import expert_tensor, gate_tensor
from experts.bundles.manifest import Manifest
from experts.bundles.probe import self_test
from experts.errors import InvalidBundleError
from experts.kernels.registry import get_kernel
from experts.registry.registry import Registry
from tests.checkpoint.support import Edit, StateDict, make_split, state_dict_of

WORDS = BundleCard(
    version="1.1.0", description="trained", authors="us", license="Apache-2.0", intended_use="tests, not patients"
)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, golden_dir: Path) -> Path:
    directory = tmp_path_factory.mktemp("pack") / "split"
    make_split(golden_dir / "base" / "checkpoint", directory, organs=("breast", "liver"))
    return directory


@pytest.fixture
def trained(base_checkpoint: Path, tmp_path: Path) -> Path:
    """What a training of the experts writes: released names, and nothing else."""
    directory = tmp_path / "trained"
    directory.mkdir()
    save_file(changed(routed(base_checkpoint)), directory / "experts.safetensors")
    return directory


def routed(checkpoint: Path) -> StateDict:
    return {name: tensor for name, tensor in state_dict_of(checkpoint).items() if is_routed(name)}


def changed(tensors: StateDict) -> StateDict:
    generator = torch.Generator().manual_seed(1)
    return {name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}


def made(source: Path, destination: Path, split: Path, card: BundleCard = WORDS, **options: Any) -> Manifest:
    return pack(source, destination, card, PackOptions(**{"organ": "breast", "checkpoint": split, **options}))


def assert_holds(directory: Path, tensors: StateDict, experts: tuple[int, ...] = (0, 1, 2, 3)) -> Bundle:
    bundle = Bundle.open(directory)
    bundle.verify(finite=True)
    for layer in range(bundle.manifest.num_layers):
        for index, expert in enumerate(experts):
            for projection in ("gate", "up", "down"):
                released = tensors[f"model.layers.{layer}.moe.experts.{expert}.{projection}_proj.weight"]
                assert torch.equal(bundle.tensor(expert_tensor(layer, index, projection)), released)
        gate = tensors[f"model.layers.{layer}.moe.gate.weight"]
        assert torch.equal(bundle.tensor(gate_tensor(layer)), gate[list(experts)])
    return bundle


def test_a_training_output(trained: Path, split: Path, tmp_path: Path) -> None:
    manifest = made(trained, tmp_path / "b", split)
    bundle = assert_holds(tmp_path / "b", load_file(trained / "experts.safetensors"))
    assert (manifest.organ, manifest.version, manifest.name) == ("breast", "1.1.0", "test-breast")
    assert manifest.backbone_digest == read_index(split).backbone_digest
    assert manifest.source_experts is None
    assert "乳腺" in manifest.organ_synonyms
    result = self_test(bundle, get_kernel("cpu_packed"))
    assert result.recorded
    assert 0 < result.worst_error < 1e-5


def test_a_single_file_and_shards_are_the_same(trained: Path, split: Path, tmp_path: Path) -> None:
    single = made(trained / "experts.safetensors", tmp_path / "single", split)
    tensors = load_file(trained / "experts.safetensors")
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(3):
        save_file(dict(list(tensors.items())[number::3]), shards / f"part-{number}.safetensors")
    assert made(shards, tmp_path / "sharded", split).digest == single.digest


def test_the_probe_has_the_backbones_scale(trained: Path, split: Path, tmp_path: Path, base_checkpoint: Path) -> None:
    made(trained, tmp_path / "b", split)
    probe = Bundle.open(tmp_path / "b").probe(2)
    norm = state_dict_of(base_checkpoint)["model.layers.2.post_attention_layernorm.weight"]
    scaled = probe["hidden_states"] / norm
    assert torch.allclose(scaled.square().mean(dim=1), torch.ones(len(scaled)), atol=1e-4)


def test_a_released_checkpoint_with_the_same_backbone(base_checkpoint: Path, split: Path, tmp_path: Path) -> None:
    manifest = made(base_checkpoint, tmp_path / "b", split)
    assert_holds(tmp_path / "b", routed(base_checkpoint))
    assert manifest.source_experts == (0, 1, 2, 3)
    chosen = made(base_checkpoint, tmp_path / "c", split, experts=[3, 1])
    assert_holds(tmp_path / "c", routed(base_checkpoint), (3, 1))
    assert (chosen.num_experts, chosen.source_experts) == (2, (3, 1))


def test_a_released_checkpoint_whose_experts_alone_were_trained(broken: Edit, split: Path, tmp_path: Path) -> None:
    broken.tensors(lambda tensors: tensors.update(changed({n: t for n, t in tensors.items() if is_routed(n)})))
    made(broken.directory, tmp_path / "b", split)
    assert_holds(tmp_path / "b", routed(broken.directory))


def test_a_released_checkpoint_with_another_backbone(broken: Edit, split: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    broken.tensors(lambda tensors: tensors.update({name: tensors[name] * 1.0001}))
    with pytest.raises(InvalidCheckpointError, match="no other backbone than theirs"):
        made(broken.directory, tmp_path / "b", split)
    assert not (tmp_path / "b").exists()


def test_a_split_checkpoints_organ(split: Path, tmp_path: Path, base_checkpoint: Path) -> None:
    manifest = made(split, tmp_path / "b", split, BundleCard(version="1.0.1", changelog={"1.0.1": "with a probe"}))
    assert_holds(tmp_path / "b", routed(base_checkpoint))
    old = Registry(registry_root(split)).find("breast", "1.0.0")
    assert (manifest.name, manifest.license, manifest.intended_use) == (old.name, old.license, old.intended_use)
    assert manifest.changelog == {**old.changelog, "1.0.1": "with a probe"}
    assert (old.probe, manifest.probe is not None) == (None, True)
    # The files of weights are the same: a registry stores them once.
    assert {entry.sha256 for entry in old.files} < {entry.sha256 for entry in manifest.files}


def test_a_split_checkpoint_that_has_rotted(split: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(split, copy)
    registry = Registry(registry_root(copy))
    path = registry.open(registry.find("breast", "1.0.0").digest).locations["experts.safetensors"]
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidBundleError, match="is damaged"):
        made(copy, tmp_path / "b", split)


def test_another_organs_experts_for_a_new_organ(split: Path, tmp_path: Path) -> None:
    card = BundleCard(version="1.0.0", description="for lungs", organ_synonyms=("lungs",))
    manifest = made(split, tmp_path / "b", split, card, organ="lung", from_organ="liver")
    assert (manifest.organ, manifest.name, manifest.description) == ("lung", "test-lung", "for lungs")
    assert manifest.organ_synonyms == ("lungs",)
    with pytest.raises(InvalidCheckpointError, match="no organ 'spleen'"):
        made(split, tmp_path / "c", split, card, organ="lung", from_organ="spleen")


def test_a_prototype(trained: Path, split: Path, tmp_path: Path) -> None:
    prototype = torch.linspace(0, 1, 64)
    save_file({"prototype": prototype}, tmp_path / "prototype.safetensors")
    manifest = made(trained, tmp_path / "b", split, prototype=tmp_path / "prototype.safetensors")
    assert manifest.has_prototype
    found = Bundle.open(tmp_path / "b").prototype()
    assert found is not None
    assert torch.equal(found, prototype)
    save_file({"prototype": prototype[:-1].clone()}, tmp_path / "short.safetensors")
    with pytest.raises(InvalidCheckpointError, match=r"prototype is F32 \[63\]; it must be F32 \[64\]"):
        made(trained, tmp_path / "c", split, prototype=tmp_path / "short.safetensors")
    with pytest.raises(InvalidCheckpointError, match="one tensor prototype"):
        made(trained, tmp_path / "c", split, prototype=trained / "experts.safetensors")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_conversion(dtype: str, trained: Path, split: Path, tmp_path: Path) -> None:
    made(trained, tmp_path / "b", split, dtype=dtype)
    bundle = Bundle.open(tmp_path / "b")
    bundle.verify(finite=True)
    source = load_file(trained / "experts.safetensors")["model.layers.0.moe.experts.1.up_proj.weight"]
    found = bundle.tensor(expert_tensor(0, 1, "up"))
    assert torch.equal(found, source.to(getattr(torch, dtype)))
    self_test(bundle, get_kernel("reference"))


def test_what_is_packed_may_be_spread_over_files(trained: Path, split: Path, tmp_path: Path) -> None:
    manifest = made(trained, tmp_path / "b", split, max_file_bytes=100_000)
    assert len(manifest.files) > 4
    assert_holds(tmp_path / "b", load_file(trained / "experts.safetensors"))
    self_test(Bundle.open(tmp_path / "b"), get_kernel("reference"))


def lose(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor) -> Any:
    return lambda tensors: tensors.update({name: tensor})


EXPERT = "model.layers.1.moe.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lose(EXPERT), f"{EXPERT}: missing"),
        (lose("model.layers.3.moe.gate.weight"), "model.layers.3.moe.gate.weight: missing"),
        (lose("model.layers.0.moe.gate.weight"), "has no model.layers.0.moe.gate.weight"),
        (put("model.layers.4.moe.gate.weight", torch.zeros(4, 64)), "model.layers.4.moe.gate.weight: unexpected"),
        (put("model.layers.0.moe.experts.4.up_proj.weight", torch.zeros(48, 64)), "unexpected"),
        (put(EXPERT, torch.zeros(3, 3)), rf"{EXPERT}: is \[3, 3\], but"),
        (put(EXPERT, torch.full((48, 64), torch.nan)), f"{EXPERT}: has values that are infinite or not a number"),
        (put(EXPERT, torch.zeros(48, 64, dtype=torch.float16)), "the experts have several dtypes"),
        (put(EXPERT, torch.zeros(48, 64, dtype=torch.int32)), "I32 weights are not supported"),
        (put("model.layers.0.self_attn.q_proj.weight", torch.zeros(1)), "which is no routed expert or gate"),
    ],
)
def test_a_training_that_does_not_fit(change: Any, reason: str, trained: Path, split: Path, tmp_path: Path) -> None:
    path = trained / "experts.safetensors"
    tensors = load_file(path)
    assert tensors[EXPERT].shape == (48, 64)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(InvalidCheckpointError, match=reason):
        made(trained, tmp_path / "b", split)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trained"]


def test_sources_that_are_none(split: Path, tmp_path: Path, trained: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InvalidCheckpointError, match="holds no safetensors file"):
        made(empty, tmp_path / "b", split)
    torch.save({}, empty / "pytorch_model.bin")
    with pytest.raises(InvalidCheckpointError, match=r"pytorch_model.bin is a pickle, which is never read"):
        made(empty, tmp_path / "b", split)
    with pytest.raises(InvalidCheckpointError, match="no such file or folder"):
        made(tmp_path / "absent", tmp_path / "b", split)
    shutil.copyfile(trained / "experts.safetensors", trained / "again.safetensors")
    with pytest.raises(InvalidCheckpointError, match=r"is also in again.safetensors"):
        made(trained, tmp_path / "b", split)


def test_what_must_be_said(trained: Path, split: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpointError, match=r"the manifest needs version, description, authors, license"):
        made(trained, tmp_path / "b", split, BundleCard())
    for card, reason in (
        (WORDS.model_copy(update={"version": "one"}), "no semantic version"),
        (WORDS.model_copy(update={"eval_metrics": {"x": float("inf")}}), "eval_metrics"),
    ):
        with pytest.raises(InvalidCheckpointError, match=reason):
            made(trained, tmp_path / "b", split, card)
    for experts in ([], [0, 0], [4], [-1]):
        with pytest.raises(InvalidCheckpointError, match=r"named once each|there is no expert"):
            made(trained, tmp_path / "b", split, experts=experts)
    made(trained, tmp_path / "b", split)
    with pytest.raises(FileExistsError, match="never changed in place"):
        made(trained, tmp_path / "b", split)


def test_cards(tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    path.write_text("authors: we\neval_metrics: {bleu1: 0.3}\nreferences: [a, b]\nchangelog:\n  1.1.0: more\n")
    card = read_card(path)
    assert card == BundleCard(
        authors="we", eval_metrics={"bleu1": 0.3}, references=("a", "b"), changelog={"1.1.0": "more"}
    )
    over = BundleCard(authors="others", eval_metrics={"rouge": 0.4}).over(card)
    assert (over.authors, over.eval_metrics, over.references) == ("others", {"bleu1": 0.3, "rouge": 0.4}, ("a", "b"))
    for text, reason in (
        ("author: we", "author: is no field of a card; there are name, version"),
        ("authors: a\nauthors: b", "occurs twice"),
        ("- a", "one field a line"),
        ("[", "not YAML"),
        ("!!python/object:os.system {}", "not YAML"),
        ("eval_metrics: {a: b}", "eval_metrics.a"),
    ):
        path.write_text(text)
        with pytest.raises(InvalidCheckpointError, match=reason):
            read_card(path)
    with pytest.raises(InvalidCheckpointError, match="No such file"):
        read_card(tmp_path / "absent.yaml")


def test_progress_covers_all_that_is_read(base_checkpoint: Path, split: Path, tmp_path: Path) -> None:
    totals: list[int] = []
    steps: list[int] = []
    options = PackOptions(organ="breast", checkpoint=split)
    pack(base_checkpoint, tmp_path / "b", WORDS, options, start=totals.append, progress=steps.append)
    assert totals[-1] == sum(tensor.nbytes for tensor in state_dict_of(base_checkpoint).values())
    # A gate is read once for every layer, as everything is.
    assert sum(steps) == totals[-1]


def test_memory_does_not_grow_with_the_experts(split: Path, tmp_path: Path) -> None:
    """Experts far wider than the backbone's own: 4 layers of 4 experts, 200 MB in all."""
    inner = 16_384
    tensors: StateDict = {}
    for layer in range(4):
        tensors[f"model.layers.{layer}.moe.gate.weight"] = torch.zeros(4, 64)
        for expert in range(4):
            prefix = f"model.layers.{layer}.moe.experts.{expert}"
            tensors[f"{prefix}.gate_proj.weight"] = torch.zeros(inner, 64)
            tensors[f"{prefix}.up_proj.weight"] = torch.zeros(inner, 64)
            tensors[f"{prefix}.down_proj.weight"] = torch.zeros(64, inner)
    save_file(tensors, tmp_path / "wide.safetensors")
    code = f"""
import resource
from pathlib import Path
from echovlm_ray.checkpoint.pack import PackOptions, pack
from echovlm_ray.checkpoint.bundle_card import BundleCard
at = []
card = BundleCard(version="1.0.0", description="", authors="", license="MIT", intended_use="")
pack(Path({str(tmp_path / "wide.safetensors")!r}), Path({str(tmp_path / "b")!r}), card,
     PackOptions(organ="breast", checkpoint=Path({str(split)!r})),
     progress=lambda _: at.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - at[3])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # KiB; one layer has 50 MB.
    assert int(done.stdout) < 72 * 1024
