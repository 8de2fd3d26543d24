"""Upcycles a dense Qwen2-VL to an EchoVLM that initially computes what the dense model does.

A layer adds `c0 · (routed + shared) + c1 · dense`. With the coefficient's layer at zero c0 = c1 = ½; with the dense
`down_proj` doubled, which is exact in floating point, c1 · dense is what the dense model adds; and with the experts'
`down_proj` at zero the mixture adds nothing. Everything gets a gradient: `down_proj` at once, the rest of an expert and
the gate as soon as `down_proj` has moved.
"""

# transformers leaves most of its methods untyped.
# mypy: disable-error-code="no-untyped-call"

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen2VLForConditionalGeneration

from echovlm_ray.checkpoint.layout import InvalidCheckpointError
from echovlm_ray.checkpoint.reader import read_tensor_folder
from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.model.decoder_layer import EchoVLMDecoderLayer
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.training.recipe import UpcyclingSection


def is_dense(directory: Path) -> bool:
    """Whether a folder holds a Qwen2-VL without experts.

    Raises:
        InvalidCheckpointError: it holds no Qwen2-VL at all.
    """
    config = directory / "config.json"
    if not config.is_file():
        raise InvalidCheckpointError(f"{directory} has no config.json: give the folder of a Qwen2-VL or an EchoVLM")
    model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    if model_type != "qwen2_vl":
        raise InvalidCheckpointError(f"{config}: model_type is {model_type!r}; a Qwen2-VL is needed")
    found = read_tensor_folder(directory)
    if found.problems:
        raise InvalidCheckpointError(f"{directory}: {found.problems[0]}")
    return not any(".moe." in name for name in found.tensors)


def upcycle(directory: Path, section: UpcyclingSection, *, seed: int) -> EchoVLMForConditionalGeneration:
    """Upcycles a dense checkpoint to an EchoVLM in float32.

    Args:
        directory: a Qwen2-VL's folder.
        section: sizes, and how experts begin.
        seed: decides what is drawn at random.

    Raises:
        InvalidCheckpointError: the folder holds no dense Qwen2-VL, or lacks a tensor.
    """
    if not is_dense(directory):
        raise InvalidCheckpointError(f"{directory} has experts already: nothing to upcycle")
    loaded: Any = Qwen2VLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    dense, info = loaded
    if lacking := sorted(info["missing_keys"]):
        raise InvalidCheckpointError(f"{directory}: lacks {len(lacking)} tensors, first {lacking[0]}")
    config = EchoVLMConfig.from_pretrained(
        directory,
        num_experts=section.num_experts,
        num_experts_per_tok=section.num_experts_per_tok,
        moe_intermediate_size=section.expert_size,
        shared_expert_intermediate_size=section.shared_expert_size,
    )
    torch.manual_seed(seed)
    model: EchoVLMForConditionalGeneration = EchoVLMForConditionalGeneration._from_config(config, dtype=torch.float32)
    model.load_state_dict(dense.state_dict(), strict=False)
    model.tie_weights()
    model.generation_config = dense.generation_config
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.language_model.layers:
        assert isinstance(layer, EchoVLMDecoderLayer)
        _begin_layer(layer, section, config.text_config.initializer_range, generator)
    return model


@torch.no_grad()
def _begin_layer(
    layer: EchoVLMDecoderLayer, section: UpcyclingSection, deviation: float, generator: torch.Generator
) -> None:
    nn.init.zeros_(layer.coefficient.weight)
    nn.init.zeros_(layer.coefficient.bias)
    mlp, moe = layer.mlp, layer.moe
    experts = moe.experts
    for expert in range(section.num_experts):
        gate, up, down = _cut(layer, section.expert_size, section.redrawn, deviation, generator)
        experts.gate_up_proj[expert].copy_(torch.cat([gate, up]))
        experts.down_proj[expert].copy_(down)
    # The shared expert is one of its own, so there is nothing that it must be made to differ from.
    gate, up, down = _cut(layer, section.shared_expert_size, 0.0, deviation, generator)
    moe.shared_expert.gate_proj.weight.copy_(gate)
    moe.shared_expert.up_proj.weight.copy_(up)
    moe.shared_expert.down_proj.weight.copy_(down)
    mlp.down_proj.weight.mul_(2)
    if section.preserve:
        nn.init.zeros_(experts.down_proj)
        nn.init.zeros_(moe.shared_expert.down_proj.weight)


def _cut(
    layer: EchoVLMDecoderLayer, size: int, redrawn: float, deviation: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An expert's three matrices: inner rows of the dense MLP, some drawn again (arXiv 2502.19261, section 3).

    What is drawn has the mean and the deviation of what it takes the place of.
    """
    mlp = layer.mlp
    inner = mlp.gate_proj.weight.shape[0]
    rows = torch.randperm(inner, generator=generator)[:size]
    if size > inner:
        extra = torch.randint(inner, (size - inner,), generator=generator)
        rows = torch.cat([torch.arange(inner), extra])
    dropped = torch.randperm(size, generator=generator)[: round(redrawn * size)]
    gate, up = mlp.gate_proj.weight[rows].clone(), mlp.up_proj.weight[rows].clone()
    down = mlp.down_proj.weight[:, rows].clone()
    if not len(dropped):
        return gate, up, down
    for matrix, view in ((gate, gate[dropped]), (up, up[dropped]), (down, down[:, dropped])):
        spread = float(view.std()) if view.numel() > 1 else deviation
        drawn = torch.randn(view.shape, generator=generator) * spread + float(view.mean())
        if matrix is down:
            matrix[:, dropped] = drawn
        else:
            matrix[dropped] = drawn
    return gate, up, down
