"""The fields of a valid manifest whose files do not exist."""

from typing import Any

FIELDS: dict[str, Any] = {
    "format": "echovlm-experts-1",
    "name": "breast",
    "organ": "breast",
    "version": "1.0.0",
    "description": "",
    "authors": "a",
    "license": "MIT",
    "intended_use": "research",
    "backbone_digest": "0" * 64,
    "num_layers": 2,
    "num_experts": 2,
    "hidden_size": 4,
    "intermediate_size": 4,
    "dtype": "bfloat16",
    "files": [
        {"path": "experts.safetensors", "sha256": "1" * 64, "size": 10},
        {"path": "gate.safetensors", "sha256": "2" * 64, "size": 10},
    ],
}
