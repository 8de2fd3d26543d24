import json
from pathlib import Path

import pytest

from echovlm_ray.checkpoint.layout import InvalidCheckpointError
from echovlm_ray.checkpoint.reader import read_tensor_folder
from echovlm_ray.checkpoint.schema import PARTS, ModelShape, backbone_digest, is_routed, part_of

RELEASED = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    # As released: the rest of the vision tower is at Qwen2-VL's defaults.
    "vision_config": {"in_chans": 3, "model_type": "qwen2_vl", "hidden_size": 3584},
}


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    total = 0
    for shape in shapes.values():
        elements = 1
        for size in shape:
            elements *= size
        total += elements
    return total


def test_released_sizes_add_up_to_what_the_paper_says() -> None:
    shape = ModelShape.from_config(RELEASED)
    assert count(shape.backbone_tensors() | shape.routed_tensors()) / 1e9 == pytest.approx(11.68, abs=0.01)
    experts = {name: size for name, size in shape.routed_tensors().items() if ".experts." in name}
    assert count(experts) / 1e9 == pytest.approx(1.70, abs=0.01)
    assert count(shape.vision.tensors()) / 1e9 == pytest.approx(0.68, abs=0.01)


def test_names_and_shapes_are_those_of_the_golden_checkpoints(golden_checkpoint: Path) -> None:
    shape = ModelShape.from_config(json.loads((golden_checkpoint / "config.json").read_text()))
    stored = read_tensor_folder(golden_checkpoint).tensors
    assert shape.backbone_tensors() | shape.routed_tensors() == {name: entry.shape for name, entry in stored.items()}
    assert {part_of(name) for name in stored} == set(PARTS)
    assert {name for name in stored if is_routed(name)} == set(shape.routed_tensors())


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.moe.experts.0.gate_proj.bias", "model.layers.x.mlp.up_proj.weight", "optimizer.state", "visual"],
)
def test_names_that_no_echovlm_has(name: str) -> None:
    assert part_of(name) is None or not is_routed(name)
    assert name not in ModelShape.from_config(RELEASED).backbone_tensors()


def test_tied_embeddings_have_no_head() -> None:
    tied = ModelShape.from_config(RELEASED | {"tie_word_embeddings": True}).backbone_tensors()
    assert set(ModelShape.from_config(RELEASED).backbone_tensors()) - set(tied) == {"lm_head.weight"}


def test_sizes_may_be_nested_as_newer_transformers_writes_them() -> None:
    nested = {"vision_config": RELEASED["vision_config"]}
    nested["text_config"] = {key: value for key, value in RELEASED.items() if key != "vision_config"}
    assert ModelShape.from_config(nested) == ModelShape.from_config(RELEASED)


def test_number_of_experts_is_four_when_left_out_as_in_the_reference() -> None:
    config = {key: value for key, value in RELEASED.items() if key != "num_experts"}
    assert ModelShape.from_config(config).num_experts == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": 27}, "cannot be divided"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than num_experts 4"),
        ({"vision_config": {"depth": -1}}, "depth"),
        ({"vision_config": [1]}, "vision_config"),
    ],
)
def test_impossible_sizes_are_named(change: dict[str, object], reason: str) -> None:
    config = {key: value for key, value in (RELEASED | change).items() if value is not None}
    with pytest.raises(InvalidCheckpointError, match=reason):
        ModelShape.from_config(config)


def test_backbone_digest_tells_what_matters() -> None:
    tensors = {"model.norm.weight": ("F32", (4,), "a" * 64)}
    digest = backbone_digest(RELEASED, tensors)
    spelled_out = RELEASED | {"vision_config": {"hidden_size": 3584, "depth": 32}, "transformers_version": "5"}
    assert backbone_digest(spelled_out, tensors) == digest
    assert backbone_digest(RELEASED | {"num_key_value_heads": 7}, tensors) != digest
    assert backbone_digest(RELEASED, {"model.norm.weight": ("BF16", (4,), "a" * 64)}) != digest
    assert backbone_digest(RELEASED, {"model.norm.weight": ("F32", (4,), "b" * 64)}) != digest
    # The experts are not the backbone's: an organ may have more of them.
    assert backbone_digest(RELEASED | {"num_experts": 8}, tensors) == digest
