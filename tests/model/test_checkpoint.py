"""Loading and saving: the released layout bit for bit, strict names, split folders, and parts of the model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2VLConfig

from echovlm_ray import EchoVLMConfig, EchoVLMForConditionalGeneration
from echovlm_ray.checkpoint.groups import clone_groups, partition_groups
from echovlm_ray.checkpoint.layout import InvalidCheckpointError
from echovlm_ray.checkpoint.reader import read_config
from echovlm_ray.checkpoint.schema import ModelShape
from echovlm_ray.checkpoint.split import Labels, split
from echovlm_ray.model.checkpoint import load_backbone, load_vision_tower
from echovlm_ray.model.pretrained import CheckpointMismatchError
from experts.bundles.writer import write_bundle
from experts.registry.registry import Registry
from tests.model.support import assert_same_tensors, image_prompt, small_model, stored_tensors

ROOT = Path(__file__).resolve().parents[2]
load: Any = EchoVLMForConditionalGeneration.from_pretrained


@torch.inference_mode()
def logits_of(model: EchoVLMForConditionalGeneration) -> torch.Tensor:
    logits: torch.Tensor = model(**image_prompt()).logits
    return logits


def assert_close(left: torch.Tensor, right: torch.Tensor) -> None:
    """Equal but for the last bits: those of a matrix product depend on where in memory a weight starts."""
    assert left.dtype == right.dtype
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5 if left.dtype == torch.float32 else 0.05)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with six experts, in the released layout."""
    directory = tmp_path_factory.mktemp("released")
    small_model(num_experts=6).save_pretrained(directory)
    return directory


@pytest.fixture
def altered(released: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """The checkpoint after something was done to its tensors."""

    def alter(change: Callable[[dict[str, Any]], None]) -> Path:
        target = tmp_path / "altered"
        shutil.copytree(released, target)
        tensors = stored_tensors(target)
        change(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        return target

    return alter


@pytest.mark.parametrize("variant", ["base", "bf16"])
def test_the_golden_checkpoints_round_trip_bit_for_bit(golden_dir: Path, tmp_path: Path, variant: str) -> None:
    source = golden_dir / variant / "checkpoint"
    model = load(source)
    assert {parameter.dtype for parameter in model.parameters()} == {
        torch.float32 if variant == "base" else torch.bfloat16
    }
    model.save_pretrained(tmp_path)
    assert_same_tensors(stored_tensors(source), stored_tensors(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen2_vl"
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (995, 996)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "100KB"], ids=["single", "sharded"])
def test_every_kind_of_file_round_trips(tmp_path: Path, tied: bool, dtype: torch.dtype, max_shard_size: str) -> None:
    model = small_model(tie_word_embeddings=tied, dtype=dtype)
    model.save_pretrained(tmp_path / "first", max_shard_size=max_shard_size)
    assert (tmp_path / "first" / "model.safetensors.index.json").exists() == (max_shard_size == "100KB")
    first = stored_tensors(tmp_path / "first")
    assert ("lm_head.weight" in first) != tied
    again = load(tmp_path / "first")
    assert again.dtype == dtype
    assert (again.lm_head.weight is again.model.language_model.embed_tokens.weight) == tied
    assert_close(logits_of(again), logits_of(model))
    again.save_pretrained(tmp_path / "second")
    assert_same_tensors(first, stored_tensors(tmp_path / "second"))


def test_a_dtype_can_be_asked_for(released: Path) -> None:
    model = load(released, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_number_of_experts_is_the_configs(released: Path) -> None:
    assert json.loads((released / "config.json").read_text())["num_experts"] == 6
    assert load(released).model.language_model.layers[0].moe.gate.weight.shape == (6, 64)


def test_the_tools_and_the_model_agree_on_the_tensors(released: Path) -> None:
    shape = ModelShape.from_config(read_config(released))
    stored = {name: tuple(tensor.shape) for name, tensor in stored_tensors(released).items()}
    assert {**shape.backbone_tensors(), **shape.routed_tensors()} == stored


EXPERT = "model.layers.1.moe.experts.4.up_proj.weight"


@pytest.mark.parametrize(
    "name", [EXPERT, "model.layers.0.moe.gate.weight", "visual.merger.ln_q.bias", "model.norm.weight"]
)
def test_a_missing_tensor_is_named(altered: Callable[..., Path], name: str) -> None:
    with pytest.raises(CheckpointMismatchError, match=f"1 missing: {name}") as raised:
        load(altered(lambda tensors: tensors.pop(name)))
    assert raised.value.missing == (name,)


@pytest.mark.parametrize("name", ["model.layers.1.moe.experts.6.up_proj.weight", "model.layers.0.router.weight"])
def test_an_unexpected_tensor_is_named(altered: Callable[..., Path], name: str) -> None:
    with pytest.raises(CheckpointMismatchError, match=f"1 unexpected: {name}") as raised:
        load(altered(lambda tensors: tensors.update({name: torch.zeros(48, 64)})))
    assert raised.value.unexpected == (name,)


def test_a_tensor_of_another_shape_is_named(altered: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointMismatchError, match=rf"{EXPERT} is \[48, 63\], should be \[48, 64\]"):
        load(altered(lambda tensors: tensors.update({EXPERT: torch.zeros(48, 63)})))


def test_more_experts_than_the_config_says_are_refused(released: Path, tmp_path: Path) -> None:
    shutil.copytree(released, tmp_path / "four")
    config = json.loads((released / "config.json").read_text())
    (tmp_path / "four" / "config.json").write_text(json.dumps({**config, "num_experts": 4}))
    with pytest.raises(CheckpointMismatchError, match="is num_experts right"):
        load(tmp_path / "four")


def test_a_plain_qwen2_vl_is_told_apart(altered: Callable[..., Path]) -> None:
    def strip(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".moe." in name or ".coefficient." in name]:
            del tensors[name]

    with pytest.raises(CheckpointMismatchError, match="a plain Qwen2-VL, not an EchoVLM"):
        load(altered(strip))


def test_a_state_dict_is_held_to_the_same(released: Path) -> None:
    tensors = stored_tensors(released)
    del tensors["model.layers.0.coefficient.bias"]
    with pytest.raises(CheckpointMismatchError, match=r"coefficient.bias"):
        EchoVLMForConditionalGeneration.from_pretrained(
            None, config=EchoVLMConfig.from_pretrained(released), state_dict=tensors
        )


def test_a_config_without_experts_is_refused(released: Path) -> None:
    with pytest.raises(InvalidCheckpointError, match="Qwen2VLConfig, which knows no experts"):
        load(released, config=Qwen2VLConfig())


def test_damaged_files_are_refused(altered: Callable[..., Path]) -> None:
    folder = altered(lambda tensors: None)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    for loader in (load, load_vision_tower):
        with pytest.raises(InvalidCheckpointError, match="truncated"):
            loader(folder)


def test_an_organ_of_a_checkpoint_that_is_not_split_is_refused(released: Path) -> None:
    with pytest.raises(InvalidCheckpointError, match=r"not a split checkpoint.*carry no organ"):
        load(released, organ="breast")


@pytest.fixture(scope="module")
def cloned(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("cloned") / "split"
    split(
        released,
        target,
        groups=lambda experts: clone_groups(["breast", "liver"], experts),
        routing="organs",
        labels=Labels(name="small"),
    )
    return target


@pytest.fixture(scope="module")
def divided(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("divided") / "split"
    split(
        released,
        target,
        groups=lambda experts: partition_groups({"liver": [1, 4, 5], "breast": [0, 2, 3]}, experts),
        routing="flat",
        labels=Labels(name="small"),
    )
    return target


@pytest.mark.parametrize("organ", ["breast", "liver"])
def test_a_split_folder_with_an_organ_is_the_whole_model(
    released: Path, cloned: Path, tmp_path: Path, organ: str
) -> None:
    model = load(cloned, organ=organ, output_router_logits=True)
    assert model.config.text_config.output_router_logits
    assert_close(logits_of(model), logits_of(load(released)))
    assert model.generation_config.eos_token_id == 995
    model.save_pretrained(tmp_path)
    assert_same_tensors(stored_tensors(released), stored_tensors(tmp_path))


def test_an_organs_own_experts_are_taken(cloned: Path, tmp_path: Path) -> None:
    shutil.copytree(cloned, tmp_path / "split")
    index = json.loads((tmp_path / "split" / "echovlm.json").read_text())
    registry = Registry(tmp_path / "split" / "registry")
    liver = registry.open(index["organs"][1]["bundle_digest"])
    description = liver.manifest.model_dump(exclude={"format", "files"})
    # A later version may have another number of experts.
    description |= {"version": "2.0.0", "num_experts": 3, "source_experts": None}

    def source(name: str) -> torch.Tensor:
        layer = int(name.split(".")[1])
        if name.endswith("gate.weight"):
            return liver.gate_ED(layer)[:3] + 1
        expert, projection = int(name.split(".")[3]), name.split(".")[4]
        weights = liver.load_layer(layer)
        by_name = {"gate_proj": weights.gate_EFD, "up_proj": weights.up_EFD, "down_proj": weights.down_EDF}
        return by_name[projection][expert] * 2

    write_bundle(tmp_path / "bundle", type(liver.manifest).__mro__[1](**description), source)
    index["organs"][1] |= {"version": "2.0.0", "bundle_digest": registry.push(tmp_path / "bundle").digest}
    (tmp_path / "split" / "echovlm.json").write_text(json.dumps(index))
    changed, kept = load(tmp_path / "split", organ="liver"), load(tmp_path / "split", organ="breast")
    assert changed.config.text_config.num_experts == 3
    assert torch.equal(logits_of(kept), logits_of(load(cloned, organ="liver")))
    assert not torch.allclose(logits_of(changed), logits_of(kept))
    moe = changed.model.language_model.layers[1].moe
    assert torch.equal(moe.gate.weight, liver.gate_ED(1)[:3] + 1)
    assert torch.equal(moe.experts.down_proj, liver.load_layer(1).down_EDF[:3] * 2)


def test_a_partition_is_one_model_of_all_groups(released: Path, divided: Path) -> None:
    model, whole = load(divided), load(released)
    assert_close(logits_of(model), logits_of(whole))
    # In set order, as the router stacks the gate.
    order = [1, 4, 5, 0, 2, 3]
    gate = model.model.language_model.layers[0].moe.gate.weight
    assert torch.equal(gate, whole.model.language_model.layers[0].moe.gate.weight[order])


def test_the_organs_are_listed_when_one_is_needed(cloned: Path, divided: Path) -> None:
    with pytest.raises(InvalidCheckpointError, match=r"say whose.*breast, liver"):
        load(cloned)
    with pytest.raises(InvalidCheckpointError, match="no organ 'heart'; it has breast, liver"):
        load(cloned, organ="heart")
    with pytest.raises(InvalidCheckpointError, match="divides its experts among liver, breast"):
        load(divided, organ="breast")


def test_experts_of_another_backbone_are_refused(cloned: Path, tmp_path: Path) -> None:
    shutil.copytree(cloned, tmp_path / "split")
    index = json.loads((tmp_path / "split" / "echovlm.json").read_text())
    (tmp_path / "split" / "echovlm.json").write_text(json.dumps({**index, "backbone_digest": "0" * 64}))
    with pytest.raises(InvalidCheckpointError, match="'breast' were made for another backbone"):
        load(tmp_path / "split", organ="breast")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["stored", "bfloat16"])
def test_the_backbone_is_the_model_without_its_experts(tmp_path: Path, tied: bool, dtype: torch.dtype | None) -> None:
    small_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "whole")
    split(
        tmp_path / "whole",
        tmp_path / "split",
        groups=lambda experts: clone_groups(["breast"], experts),
        routing="organs",
        labels=Labels(name="small"),
    )
    whole = load(tmp_path / "whole", dtype=dtype or "auto")
    backbone = load_backbone(tmp_path / "split" / "backbone", dtype=dtype)
    tower = load_vision_tower(tmp_path / "split", dtype=dtype)
    assert backbone.model.visual is None
    assert not [name for name, _ in backbone.named_parameters() if "moe.gate" in name or "moe.experts" in name]
    tensors = [
        *backbone.named_parameters(),
        *backbone.named_buffers(),
        *tower.named_parameters(),
        *tower.named_buffers(),
    ]
    assert not [name for name, tensor in tensors if tensor.is_meta or tensor.requires_grad]
    assert backbone.dtype == tower.dtype == (dtype or torch.float32)
    assert (backbone.lm_head.weight is backbone.get_input_embeddings().weight) == tied

    class OwnExperts:
        def begin(self, layer: int, x_TD: torch.Tensor) -> Any:
            return whole.model.language_model.layers[layer].moe.begin(layer, x_TD)

    inputs = image_prompt()
    with torch.inference_mode():
        pictures = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        expected_pictures = whole.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        assert_close(pictures, torch.cat(expected_pictures.pooler_output))
        embeddings = backbone.get_input_embeddings()(inputs["input_ids"])
        embeddings[inputs["input_ids"] == 990] = pictures
        expected = whole(**inputs)
        outputs = backbone.model.language_model(
            inputs_embeds=embeddings,
            position_ids=backbone_positions(whole, inputs),
            use_cache=False,
            routed_experts=OwnExperts(),
        )
        assert_close(backbone.lm_head(outputs.last_hidden_state), expected.logits)
        with pytest.raises(ValueError, match="pass routed_experts"):
            backbone(input_ids=torch.tensor([[1, 2]]))


def backbone_positions(model: EchoVLMForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    from echovlm_ray.model.positions import mrope_positions

    grids = [tuple(grid) for grid in inputs["image_grid_thw"].tolist()]
    return mrope_positions(inputs["input_ids"][0], grids, [], model.config)[0][:, None]


def test_a_backbone_must_be_one(released: Path, cloned: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"unexpected: model\.layers\.0\.moe.*echoray checkpoint split"):
        load_backbone(released)
    with pytest.raises(CheckpointMismatchError, match="load the folder that holds it"):
        load(cloned / "backbone")
    shutil.copytree(cloned / "backbone", tmp_path / "backbone")
    tensors = stored_tensors(tmp_path / "backbone")
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["visual.merger.ln_q.weight"]
    save_file(tensors, tmp_path / "backbone" / "model.safetensors")
    for loader, name in ((load_backbone, "mlp.up_proj"), (load_vision_tower, "visual.merger.ln_q.weight")):
        with pytest.raises(CheckpointMismatchError, match=f"1 missing: .*{name}"):
            loader(tmp_path / "backbone")


def test_loading_a_backbone_holds_it_in_memory_once(tmp_path: Path) -> None:
    small_model(hidden_size=512, vocab_size=60_000, rope_scaling=None, num_hidden_layers=1).save_pretrained(tmp_path)
    tensors = {n: t for n, t in stored_tensors(tmp_path).items() if ".moe.gate" not in n and ".moe.experts" not in n}
    save_file(tensors, tmp_path / "model.safetensors")
    size = sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("visual."))
    # Not getrusage: its peak is inherited from the process that started this one.
    code = (
        "import re, sys\n"
        "import echovlm_ray.model.checkpoint as checkpoint\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) * 1024\n"
        "before = peak()\n"
        "model = checkpoint.load_backbone(sys.argv[1])\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, cwd=ROOT)
    assert size > 200e6
    assert size * 0.9 < int(done.stdout) < size * 1.25
