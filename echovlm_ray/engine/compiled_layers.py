"""The parts of a layer that compiled functions compute: see `echovlm_ray.engine.compiled`.

Where weights are packed so that compiled functions can multiply with them, one call computes all up to the attention,
one all between attention and experts, and one the dense MLP and the shared expert. Elsewhere the products stand between
calls of the same functions.
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from echovlm_ray.engine.attention import AttentionStep, PagedSelfAttention, attend_prefills
from echovlm_ray.engine.beside_experts import FusedBesideExperts
from echovlm_ray.engine.compiled import (
    attend_decoding,
    attend_to_sequences,
    dense_and_shared,
    mix,
    normalize,
    project_and_normalize,
    rotate_and_store,
)
from echovlm_ray.engine.kv_cache import BLOCK_SIZE
from echovlm_ray.model.modeling import EchoVLMDecoderLayer, MixedWithExperts
from echovlm_ray.model.packing import compiled_products
from experts.kernels.compiled import Ints, as_array
from experts.kernels.expert_arithmetic import swiglu


class CompiledRMSNorm(nn.Module):
    """Takes the place of a Qwen2-VL norm."""

    def __init__(self, norm: Qwen2VLRMSNorm) -> None:
        """Takes the weight over."""
        super().__init__()
        self.weight = norm.weight
        self.weight_D = as_array(norm.weight.data)
        self.epsilon: float = norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """… × hidden to the same."""
        x_TD = x.reshape(-1, x.shape[-1])
        output_TD = torch.empty_like(x_TD)
        normalize(as_array(x_TD), self.weight_D, self.epsilon, as_array(output_TD))
        return output_TD.view_as(x)


class CompiledAttention(nn.Module):
    """A layer's attention with both norms and the residual sum."""

    attention: PagedSelfAttention
    before: CompiledRMSNorm
    after: CompiledRMSNorm

    def __init__(self, layer: EchoVLMDecoderLayer) -> None:
        """Takes over the norms' weights and shares the paged attention, whose products may be packed later."""
        super().__init__()
        assert isinstance(layer.self_attn, PagedSelfAttention)
        self.attention = layer.self_attn
        self.before = CompiledRMSNorm(layer.input_layernorm)
        self.after = CompiledRMSNorm(layer.post_attention_layernorm)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_step: AttentionStep,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `EchoVLMDecoderLayer.attends`."""
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        attention, step = self.attention, attention_step
        shape = len(hidden_TD), attention.num_heads, attention.head_dim
        query_THD, attended_THD = hidden_TD.new_empty(shape), hidden_TD.new_empty(shape)
        if step.rotation is None:
            cos, sin = (as_array(each[0].contiguous()) for each in position_embeddings)
            step.rotation = cos, sin
        keys_SHD, values_SHD = step.cache.arrays_L[attention.layer]
        decodes = step.compiled_decodes
        assert decodes is not None
        sequences = decodes.rows_B, decodes.block_tables_BN, decodes.lengths_B
        scores = attention.scaling, BLOCK_SIZE
        hidden, query, attended = as_array(hidden_TD), as_array(query_THD), as_array(attended_THD)
        place = step.rotation[0], step.rotation[1], step.new_slots.numpy(), keys_SHD, values_SHD
        products = self._products
        if products is not None:
            before = self.before.weight_D, self.before.epsilon
            attend_to_sequences(hidden, *before, products[0], *place, *sequences, *scores, query, attended)
        else:
            rotate_and_store(as_array(attention.qkv_proj(self.before(hidden_TD))), *place, query)
            if len(decodes.rows_B):
                attend_decoding(query, *sequences, keys_SHD, values_SHD, *scores, attended)
        attend_prefills(step, attention.layer, query_THD, attention.scaling, attended_THD)
        if products is not None:
            residual_TD, x_TD = torch.empty_like(hidden_TD), torch.empty_like(hidden_TD)
            attended_TD = attended.reshape(len(attended), -1)
            after = self.after.weight_D, self.after.epsilon
            project_and_normalize(hidden, attended_TD, products[1], *after, as_array(residual_TD), as_array(x_TD))
        else:
            residual_TD = hidden_TD + attention.o_proj(attended_THD.flatten(1))
            x_TD = self.after(residual_TD)
        return residual_TD.view_as(hidden_states), x_TD.view_as(hidden_states)

    @functools.cached_property
    def _products(self) -> tuple[Ints, ...] | None:
        """For compiled functions, where the layers are packed for them. Asked when they are packed."""
        return compiled_products(self.attention.qkv_proj, self.attention.o_proj)


class CompiledBesideExperts(FusedBesideExperts):
    """Dense MLP and shared expert, and the final sum."""

    def forward(self, x: torch.Tensor) -> MixedWithExperts:
        """See `EchoVLMDecoderLayer.fused`."""
        x_TD = x.reshape(-1, x.shape[-1])
        dense_size, _, shared_size = self.sizes[:3]
        if self._products is None:
            projected_TF = self.in_proj(x_TD)
            dense_TD = self.dense_down(_swiglu(projected_TF, 0, dense_size))
            shared_TD = self.shared_down(_swiglu(projected_TF, 2 * dense_size, shared_size))
        else:
            projected_TF = x_TD.new_empty((len(x_TD), sum(self.sizes)))
            dense_TD, shared_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
            inputs_I, dense_down_I, shared_down_I = self._products
            weights = inputs_I, dense_down_I, shared_down_I
            outputs = as_array(projected_TF), as_array(dense_TD), as_array(shared_TD)
            dense_and_shared(as_array(x_TD), *weights, dense_size, shared_size, *outputs)
        return _CompiledMixture(dense_TD, shared_TD, projected_TF, 2 * (dense_size + shared_size))

    @functools.cached_property
    def _products(self) -> tuple[Ints, ...] | None:
        """For compiled functions, where the layers are packed for them. Asked when they are packed."""
        return compiled_products(self.in_proj, self.dense_down, self.shared_down)


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
