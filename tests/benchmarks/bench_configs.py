"""A benchmark configuration small enough for tests."""

import json
from pathlib import Path
from typing import Any

from benchmarks.host_costs import SMALL

TINY: dict[str, Any] = SMALL | {
    "architectures": ["Qwen2VLMOEForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_act": "silu",
    "num_hidden_layers": 2,
    "max_position_embeddings": 4096,
    "max_window_layers": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
}


def write_tiny_configs(directory: Path) -> Path:
    """`config_tiny.json` with copies for the organs, and `config_tiny_partition.json` with one expert for each."""
    (directory / "config_tiny.json").write_text(json.dumps(TINY))
    (directory / "config_tiny_partition.json").write_text(json.dumps(TINY | {"num_experts": 7}))
    return directory
