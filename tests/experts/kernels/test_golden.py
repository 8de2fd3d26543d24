"""P1 for the experts: the intermediates of the reference implementation."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experts.kernels.base import ExpertWeights
from experts.kernels.registry import get_kernel

# Relative to the largest value: the project's bounds for logits are wider still.
TOLERANCE = {"base": 1e-6, "bf16": 1e-2}


@pytest.mark.parametrize("name", ["reference", "cpu_packed", "torch_grouped", "auto"])
@pytest.mark.parametrize("variant", TOLERANCE)
def test_routed_experts_of_every_layer(name: str, variant: str, golden_dir: Path) -> None:
    checkpoint = load_file(golden_dir / variant / "checkpoint" / "model.safetensors")
    kernel = get_kernel(name)
    compared = 0
    for path in sorted((golden_dir / variant).glob("*.safetensors")):
        case = load_file(path)
        for layer in range(4):
            mid = f"mid.layer.{layer}."
            if mid + "ffn_in" not in case:
                continue
            stacks = [
                torch.stack([checkpoint[f"model.layers.{layer}.moe.experts.{e}.{p}_proj.weight"] for e in range(4)])
                for p in ("gate", "up", "down")
            ]
            x_TD = case[mid + "ffn_in"].flatten(0, 1)
            index_TK, weight_TK = case[mid + "topk_index"].int(), case[mid + "topk_weights"].to(x_TD.dtype)
            routed_TD = kernel.load(ExpertWeights(*stacks)).forward(x_TD, index_TK, weight_TK)
            # moe_out is the routed experts and the shared one together; shared_out comes before its gate.
            shared_TD = torch.sigmoid(case[mid + "shared_gate_logit"]) * case[mid + "shared_out"].flatten(0, -2)
            expected_TD = case[mid + "moe_out"].flatten(0, 1)
            error = (routed_TD.double() + shared_TD.double() - expected_TD.double()).abs().max()
            assert error <= TOLERANCE[variant] * expected_TD.double().abs().max(), f"{path.stem}, layer {layer}"
            compared += 1
    assert compared >= 12


def test_the_comparison_sees_a_wrong_expert(golden_dir: Path) -> None:
    case = load_file(golden_dir / "base" / "text_only.safetensors")
    checkpoint = load_file(golden_dir / "base" / "checkpoint" / "model.safetensors")
    stacks = [
        torch.stack([checkpoint[f"model.layers.0.moe.experts.{e}.{p}_proj.weight"] for e in range(4)])
        for p in ("gate", "up", "down")
    ]
    x_TD, index_TK = case["mid.layer.0.ffn_in"].flatten(0, 1), case["mid.layer.0.topk_index"].int()
    prepared = get_kernel("reference").load(ExpertWeights(*stacks))
    right = prepared.forward(x_TD, index_TK, case["mid.layer.0.topk_weights"])
    wrong = prepared.forward(x_TD, (index_TK + 1) % 4, case["mid.layer.0.topk_weights"])
    assert (right - wrong).abs().max() > 0.1 * right.abs().max()
