"""What the model's tests share: golden cases as batches, and small checkpoints in the released layout."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from echovlm_ray import EchoVLMConfig, EchoVLMForConditionalGeneration
from tests.golden_cases import CASES

ALL_CASES = [(variant, case) for variant, cases in CASES.items() for case in cases]
IMAGE, VIDEO, START, END, EOS, PAD = 990, 991, 992, 993, 995, 996
TEXT = {"input_ids": torch.tensor([[1, 2, 3, 4, 5, 6, 7]])}


@dataclass(frozen=True)
class GoldenCase:
    directory: Path
    variant: str
    name: str

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.directory / self.variant / f"{self.name}.safetensors")

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {key.removeprefix("in."): value for key, value in self.tensors.items() if key.startswith("in.")}

    @property
    def mask(self) -> torch.Tensor:
        return self.tensors["in.attention_mask"].bool()

    @property
    def eos(self) -> int:
        manifest = json.loads((self.directory / "manifest.json").read_text())
        eos: int = manifest["variants"][self.variant]["cases"][self.name].get("eos", EOS)
        return eos

    def tolerance(self, expected: torch.Tensor) -> float:
        """P1: float32 1e-4; bfloat16 3e-2 of the largest value."""
        return 1e-4 if self.variant == "base" else 3e-2 * expected.float().abs().max().item()


class FullCases(dict[tuple[str, str], GoldenCase]):
    def __init__(self, directory: Path) -> None:
        super().__init__({key: GoldenCase(directory, *key) for key in ALL_CASES})


def small_config(**changes: Any) -> EchoVLMConfig:
    """The golden checkpoints' sizes, with two layers, half the vocabulary, and whatever a test needs otherwise."""
    fields: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 4},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "bos_token_id": 994,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "initializer_range": 0.2,
    }
    return EchoVLMConfig(**{**fields, **changes})


def small_model(seed: int = 0, **changes: Any) -> EchoVLMForConditionalGeneration:
    torch.manual_seed(seed)
    config = small_config(**changes)
    model: EchoVLMForConditionalGeneration = EchoVLMForConditionalGeneration._from_config(config).eval()  # type: ignore[no-untyped-call]
    return model


@torch.inference_mode()
def logits_of(model: EchoVLMForConditionalGeneration, **inputs: Any) -> torch.Tensor:
    """The logits of one forward pass."""
    logits: torch.Tensor = model(**inputs).logits
    return logits


def image_prompt(
    grid: tuple[int, int, int] = (1, 4, 6), *, tail: tuple[int, ...] = (11, 12, 13)
) -> dict[str, torch.Tensor]:
    """A prompt with one image, as forward takes it."""
    generator = torch.Generator().manual_seed(7)
    count = grid[0] * grid[1] * grid[2]
    return {
        "input_ids": torch.tensor([[5, 6, START, *[IMAGE] * (count // 4), *((END, *tail) if tail else ())]]),
        "pixel_values": torch.randn(count, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([grid]),
    }


def stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, however many files they lie in."""
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [
        name
        for name, tensor in left.items()
        if tensor.dtype != right[name].dtype or not torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8))
    ]
    assert not different
