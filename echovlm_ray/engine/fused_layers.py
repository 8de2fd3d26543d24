"""Prepares a backbone for the engine: paged attention, and fewer products in every layer."""

import logging

import torch
import torch.nn.functional as F
from torch import nn

from echovlm_ray.engine.attention import PagedSelfAttention
from echovlm_ray.engine.concatenate import concatenated
from echovlm_ray.model.modeling import BesideExperts, EchoVLMDecoderLayer, EchoVLMTextModel
from experts.kernels.silu_multiply import silu_and_multiply

logger = logging.getLogger(__name__)


def fuse_layers(model: EchoVLMTextModel) -> None:
    """Replaces attention, dense MLP and shared expert of every layer; afterwards the model can only infer.

    Raises:
        ValueError: the activation is not silu, which is the only one that the checkpoints of this model have.
    """
    if model.config.hidden_act != "silu":
        raise ValueError(f"hidden_act is {model.config.hidden_act!r}; the engine computes only silu")
    for layer in model.layers:
        assert isinstance(layer, EchoVLMDecoderLayer)
        # By name, for it is no Qwen2VLAttention.
        layer.set_submodule("self_attn", PagedSelfAttention(layer.self_attn))
        layer.fused = FusedBesideExperts(layer)
        del layer.mlp, layer.coefficient, layer.moe.shared_expert, layer.moe.shared_expert_gate
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

    def forward(self, x: torch.Tensor) -> BesideExperts:
        """See `EchoVLMDecoderLayer`."""
        x_TD = x.reshape(-1, x.shape[-1])
        gate, up, shared_gate, shared_up, factor_T1, coefficient_T2 = self.in_proj(x_TD).split(self.sizes, dim=1)
        dense_TD = self.dense_down(self._inner(gate, up))
        shared_TD = F.sigmoid(factor_T1) * self.shared_down(self._inner(shared_gate, shared_up))
        return dense_TD.view_as(x), shared_TD, coefficient_T2.view(*x.shape[:-1], 2)

    @staticmethod
    def _inner(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
        return silu_and_multiply(gate_TF, up_TF) if gate_TF.device.type == "cpu" else F.silu(gate_TF) * up_TF
