"""Prepares a backbone for the engine: paged attention, and fewer products and operators in every layer."""

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from echovlm_ray.engine.attention import PagedSelfAttention
from echovlm_ray.engine.compiled import mix, normalize
from echovlm_ray.engine.concatenate import concatenated
from echovlm_ray.model.modeling import BesideExperts, EchoVLMDecoderLayer, EchoVLMTextModel, MixedWithExperts
from experts.kernels.compiled import as_array
from experts.kernels.expert_arithmetic import swiglu
from experts.kernels.silu_multiply import silu_and_multiply

logger = logging.getLogger(__name__)


def fuse_layers(model: EchoVLMTextModel, *, compiled: bool) -> None:
    """Replaces attention, norms, dense MLP and shared expert of every layer; afterwards the model can only infer.

    Args:
        model: whose layers they are.
        compiled: whether norms, activations and the final sum are computed by `echovlm_ray.engine.compiled`.

    Raises:
        ValueError: the activation is not silu, which is the only one that the checkpoints of this model have.
    """
    if model.config.hidden_act != "silu":
        raise ValueError(f"hidden_act is {model.config.hidden_act!r}; the engine computes only silu")
    for layer in model.layers:
        assert isinstance(layer, EchoVLMDecoderLayer)
        # By name, for it is no Qwen2VLAttention.
        layer.set_submodule("self_attn", PagedSelfAttention(layer.self_attn))
        layer.fused = (CompiledBesideExperts if compiled else FusedBesideExperts)(layer)
        del layer.mlp, layer.coefficient, layer.moe.shared_expert, layer.moe.shared_expert_gate
        if compiled:
            layer.set_submodule("input_layernorm", CompiledRMSNorm(layer.input_layernorm))
            layer.set_submodule("post_attention_layernorm", CompiledRMSNorm(layer.post_attention_layernorm))
    if compiled:
        model.set_submodule("norm", CompiledRMSNorm(model.norm))
    logger.info("%d layers are fused for the engine", len(model.layers))


class FusedBesideExperts(nn.Module):
    """Dense MLP, shared expert and the mixing coefficients of a layer, with one product for all that reads its input.

    It rounds where `EchoVLMDecoderLayer` does.
    """

    def __init__(self, layer: EchoVLMDecoderLayer) -> None:
        """Takes the layer's weights over."""
        super().__init__()
        dense, shared = layer.mlp, layer.moe.shared_expert
        inputs = [
            dense.gate_proj,
            dense.up_proj,
            shared.gate_proj,
            shared.up_proj,
            layer.moe.shared_expert_gate,
            layer.coefficient,
        ]
        self.sizes = [linear.out_features for linear in inputs]
        self.in_proj = concatenated(inputs)
        self.dense_down = dense.down_proj
        self.shared_down = shared.down_proj

    def forward(self, x: torch.Tensor) -> MixedWithExperts:
        """See `EchoVLMDecoderLayer.fused`."""
        x_TD = x.reshape(-1, x.shape[-1])
        gate, up, shared_gate, shared_up, factor_T1, coefficient_T2 = self.in_proj(x_TD).split(self.sizes, dim=1)
        dense_TD = self.dense_down(_activated(gate, up))
        shared_TD = F.sigmoid(factor_T1) * self.shared_down(_activated(shared_gate, shared_up))
        return BesideExperts(dense_TD.view_as(x), shared_TD, coefficient_T2.view(*x.shape[:-1], 2))


def _activated(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    return silu_and_multiply(gate_TF, up_TF) if gate_TF.device.type == "cpu" else F.silu(gate_TF) * up_TF


class CompiledBesideExperts(FusedBesideExperts):
    """The same with compiled activations; the final sum is compiled too."""

    def forward(self, x: torch.Tensor) -> MixedWithExperts:
        """See `EchoVLMDecoderLayer.fused`."""
        projected_TF = self.in_proj(x.reshape(-1, x.shape[-1]))
        dense, _, shared = self.sizes[:3]
        dense_TD = self.dense_down(_swiglu(projected_TF, 0, dense))
        shared_TD = self.shared_down(_swiglu(projected_TF, 2 * dense, shared))
        return _CompiledMixture(dense_TD, shared_TD, projected_TF, 2 * (dense + shared))


def _swiglu(projected_TF: torch.Tensor, column: int, inner_size: int) -> torch.Tensor:
    inner_TF = projected_TF.new_empty((projected_TF.shape[0], inner_size))
    swiglu(as_array(projected_TF), column, column + inner_size, as_array(inner_TF))
    return inner_TF


@dataclass(frozen=True, slots=True)
class _CompiledMixture:
    """Implements `MixedWithExperts`; see `echovlm_ray.engine.compiled.mix`."""

    dense_TD: torch.Tensor
    shared_TD: torch.Tensor
    projected_TF: torch.Tensor
    factor_column: int

    def mix(self, hidden_states: torch.Tensor, routed_TD: torch.Tensor) -> torch.Tensor:
        """See `MixedWithExperts.mix`."""
        output = torch.empty_like(hidden_states)
        shape = self.dense_TD.shape
        mix(
            as_array(hidden_states.view(shape)),
            as_array(routed_TD.contiguous()),
            as_array(self.shared_TD),
            as_array(self.dense_TD),
            as_array(self.projected_TF),
            self.factor_column,
            as_array(output.view(shape)),
        )
        return output


class CompiledRMSNorm(nn.Module):
    """Takes the place of a Qwen2-VL norm."""

    def __init__(self, norm: Qwen2VLRMSNorm) -> None:
        """Takes the weight over."""
        super().__init__()
        self.weight = norm.weight
        self._weight_D = as_array(norm.weight.data)
        self.epsilon: float = norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """… × hidden to the same."""
        x_TD = x.reshape(-1, x.shape[-1])
        output_TD = torch.empty_like(x_TD)
        normalize(as_array(x_TD), self._weight_D, self.epsilon, as_array(output_TD))
        return output_TD.view_as(x)
