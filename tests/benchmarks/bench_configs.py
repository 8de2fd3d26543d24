"""A benchmark configuration small enough for tests."""

import json
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "architectures": ["Qwen2VLMOEForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_act": "silu",
    "vocab_size": 8192,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "max_window_layers": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 4},
    "image_token_id": 8180,
    "video_token_id": 8181,
    "vision_start_token_id": 8182,
    "vision_end_token_id": 8183,
    "bos_token_id": 8184,
    "eos_token_id": 8185,
    "pad_token_id": 8186,
}


def write_tiny_configs(directory: Path) -> Path:
    """`config_tiny.json` with copies for the organs, and `config_tiny_partition.json` with one expert for each."""
    (directory / "config_tiny.json").write_text(json.dumps(TINY))
    (directory / "config_tiny_partition.json").write_text(json.dumps(TINY | {"num_experts": 7}))
    return directory
