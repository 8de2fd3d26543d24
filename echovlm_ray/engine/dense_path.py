"""The dense path of a layer (everything but the routed experts) with fewer products, for the engine."""

import torch
import torch.nn.functional as F
from torch import nn

from echovlm_ray.engine.concatenate import concatenated
from echovlm_ray.model.decoder_layer import DenseOutput, DenseTensors, EchoVLMDecoderLayer
from experts.kernels.silu_multiply import silu_and_multiply


class FusedDensePath(nn.Module):
    """Dense MLP, shared expert and the mixing coefficients of a layer, with one product for all that reads its input.

    It rounds where `EchoVLMDecoderLayer` does.
    """

    def __init__(self, layer: EchoVLMDecoderLayer) -> None:
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

    def forward(self, x: torch.Tensor) -> DenseOutput:
        x_TD = x.reshape(-1, x.shape[-1])
        gate, up, shared_gate, shared_up, factor_T1, coefficient_T2 = self.in_proj(x_TD).split(self.sizes, dim=1)
        dense_TD = self.dense_down(_activated(gate, up))
        shared_TD = F.sigmoid(factor_T1) * self.shared_down(_activated(shared_gate, shared_up))
        return DenseTensors(dense_TD.view_as(x), shared_TD, coefficient_T2.view(*x.shape[:-1], 2))


def _activated(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    return silu_and_multiply(gate_TF, up_TF) if gate_TF.device.type == "cpu" else F.silu(gate_TF) * up_TF
