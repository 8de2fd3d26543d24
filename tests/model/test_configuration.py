import json
from pathlib import Path
from typing import Any

import pytest

from echovlm_ray import EchoVLMConfig
from tests.model.support import small_config

# The full-size model's file, as far as DESIGN gives it.
RELEASED: dict[str, Any] = {
    "architectures": ["Qwen2VLMOEForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 152064,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_token_id": 151654,
    "vision_config": {"in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14},
}


def write(directory: Path, config: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_what_the_file_says_is_written_back(tmp_path: Path) -> None:
    config = EchoVLMConfig.from_pretrained(write(tmp_path, RELEASED))
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    changed = {name: written.get(name) for name, value in RELEASED.items() if written.get(name) != value}
    # transformers adds the modern spelling beside the old one, which both generations of it read.
    assert changed.pop("rope_scaling") == {**RELEASED["rope_scaling"], "rope_type": "default"}
    vision = changed.pop("vision_config")
    assert {name: vision.get(name) for name in ("in_chans", "spatial_patch_size")} == {
        "in_chans": 3,
        "spatial_patch_size": 14,
    }
    assert changed == {}
    assert not {"text_config", "rope_parameters", "dtype", "layer_types"} & written.keys()
    assert EchoVLMConfig.from_pretrained(tmp_path / "again").to_diff_dict() == config.to_diff_dict()


def test_the_golden_file_round_trips(golden_dir: Path, tmp_path: Path) -> None:
    source = golden_dir / "base" / "checkpoint"
    EchoVLMConfig.from_pretrained(source).save_pretrained(tmp_path)
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "config.json").read_text())
    for config in (before, after):
        del config["transformers_version"], config["vision_config"]
    assert after == before


def test_vision_fields_that_the_file_omits_are_at_qwen2_vls_default(tmp_path: Path) -> None:
    vision = EchoVLMConfig.from_pretrained(write(tmp_path, RELEASED)).vision_config
    assert (vision.depth, vision.embed_dim, vision.hidden_size, vision.num_heads) == (32, 1280, 3584, 16)
    assert (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size) == (14, 2, 2)
    assert (vision.mlp_ratio, vision.in_channels, vision.hidden_act) == (4, 3, "quick_gelu")


def test_expert_fields_are_honoured(tmp_path: Path) -> None:
    changed = {**RELEASED, "num_experts": 7, "router_aux_loss_coef": 0.02, "norm_topk_prob": True}
    text = EchoVLMConfig.from_pretrained(write(tmp_path, changed)).text_config
    assert (text.num_experts, text.router_aux_loss_coef, text.norm_topk_prob) == (7, 0.02, True)
    assert EchoVLMConfig.from_pretrained(write(tmp_path, RELEASED)).text_config.num_experts == 4


def test_keyword_arguments_override_text_fields(tmp_path: Path) -> None:
    config = EchoVLMConfig.from_pretrained(write(tmp_path, RELEASED), num_experts=8, output_router_logits=True)
    assert config.text_config.num_experts == 8
    assert config.text_config.output_router_logits


def test_the_nested_spelling_is_read_too() -> None:
    config = small_config(num_experts=6)
    assert EchoVLMConfig.from_dict(config.to_dict()).to_diff_dict() == config.to_diff_dict()


def test_an_unused_sliding_window_is_not_applied_but_kept(tmp_path: Path) -> None:
    config = EchoVLMConfig.from_pretrained(write(tmp_path, RELEASED))
    assert config.text_config.sliding_window is None
    assert set(config.text_config.layer_types) == {"full_attention"}
    assert config.to_diff_dict()["sliding_window"] == 32768
    used = EchoVLMConfig.from_pretrained(
        write(tmp_path, {**RELEASED, "use_sliding_window": True, "max_window_layers": 20})
    )
    assert used.text_config.sliding_window == 32768
    assert used.text_config.layer_types.count("sliding_attention") == 8


@pytest.mark.parametrize("rope_scaling", [None, {"type": "mrope"}, "left out"])
def test_missing_rope_scaling_is_qwen2_vls(tmp_path: Path, rope_scaling: Any) -> None:
    config = {name: value for name, value in RELEASED.items() if name != "rope_scaling"}
    if rope_scaling != "left out":
        config["rope_scaling"] = rope_scaling
    rope = EchoVLMConfig.from_pretrained(write(tmp_path, config)).text_config.rope_parameters
    assert rope["mrope_section"] == [16, 24, 24]
    assert rope["rope_type"] == "default"
    assert rope["rope_theta"] == 1000000.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5.*num_experts, which is 4"),
        ({"num_experts": 0}, "num_experts, which is 0"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}}, "add up to 8"),
        ({"hidden_size": 96, "num_attention_heads": 8, "rope_scaling": None}, "no mrope_section"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        small_config(**changes)
