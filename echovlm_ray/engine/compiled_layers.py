"""The parts of a layer that the C library computes: see `echovlm_ray.engine.compiled`.

If weights are packed for the library, one call computes everything up to the attention, one everything between
attention and experts, and one the dense MLP and the shared expert. Otherwise products and calls of its other functions
alternate.
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from echovlm_ray.engine.attention import AttentionStep, PagedSelfAttention, attend_prefills
from echovlm_ray.engine.compiled import (
    CompiledDense,
    CompiledLayerAttention,
    CompiledTokens,
    Norm,
    library,
    mix,
    normalize,
)
from echovlm_ray.engine.dense_path import FusedDensePath
from echovlm_ray.engine.kv_cache import BLOCK_SIZE, KVCache
from echovlm_ray.model.decoder_layer import DenseOutput, EchoVLMDecoderLayer
from echovlm_ray.model.packing import PackedLinearLayer, packed_matrices
from experts.kernels.cpu.functions import swiglu


class CompiledRMSNorm(nn.Module):
    """Replaces a Qwen2-VL norm."""

    def __init__(self, norm: Qwen2VLRMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.norm = Norm(norm.weight.data, norm.variance_epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps … × hidden to the same shape."""
        x_TD = x.reshape(-1, x.shape[-1]).contiguous()
        output_TD = torch.empty_like(x_TD)
        normalize(self.norm, x_TD, output_TD)
        return output_TD.view_as(x)


class CompiledAttention(nn.Module):
    """A layer's attention with both norms and the residual sum."""

    attention: PagedSelfAttention
    before: CompiledRMSNorm
    after: CompiledRMSNorm

    def __init__(self, layer: EchoVLMDecoderLayer) -> None:
        """Uses the norms' weights and the paged attention, whose products may be packed later."""
        super().__init__()
        assert isinstance(layer.self_attn, PagedSelfAttention)
        self.attention = layer.self_attn
        self.before = CompiledRMSNorm(layer.input_layernorm)
        self.after = CompiledRMSNorm(layer.post_attention_layernorm)
        self._described: tuple[KVCache, CompiledLayerAttention, bool] | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_step: AttentionStep,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        attention, step = self.attention, attention_step
        shape = len(hidden_TD), attention.num_heads, attention.head_dim
        query_THD, attended_THD = hidden_TD.new_empty(shape), hidden_TD.new_empty(shape)
        tokens = step.compiled_tokens
        if tokens is None:
            assert step.compiled_decodes is not None
            cos_TD, sin_TD = (each[0].contiguous() for each in position_embeddings)
            tokens = CompiledTokens(cos_TD, sin_TD, step.new_slots, step.compiled_decodes)
            step.compiled_tokens = tokens
        layer, multiplies = self._layer(step.cache)
        if multiplies:
            layer.attend_to_sequences(tokens, hidden_TD, query_THD, attended_THD)
        else:
            layer.rotate_and_store(tokens, attention.qkv_proj(self.before(hidden_TD)).contiguous(), query_THD)
            layer.attend_decoding(tokens, query_THD, attended_THD)
        attend_prefills(step, attention.layer, query_THD, attention.scaling, attended_THD)
        if multiplies:
            residual_TD, x_TD = torch.empty_like(hidden_TD), torch.empty_like(hidden_TD)
            layer.project_and_normalize(hidden_TD, attended_THD, residual_TD, x_TD)
        else:
            residual_TD = hidden_TD + attention.o_proj(attended_THD.flatten(1))
            x_TD = self.after(residual_TD)
        return residual_TD.view_as(hidden_states), x_TD.view_as(hidden_states)

    def _layer(self, cache: KVCache) -> tuple[CompiledLayerAttention, bool]:
        """The layer with its part of the cache, and whether the library computes the products. Built after packing."""
        if self._described is None or self._described[0] is not cache:
            attention = self.attention
            qkv, output = packed_matrices(attention.qkv_proj, attention.o_proj) or (None, None)
            layer = CompiledLayerAttention(
                query_heads=attention.num_heads,
                scaling=attention.scaling,
                block_size=BLOCK_SIZE,
                keys_SHD=cache.key_LSHD[attention.layer],
                values_SHD=cache.value_LSHD[attention.layer],
                before=self.before.norm,
                after=self.after.norm,
                qkv=qkv,
                output=output,
            )
            self._described = cache, layer, qkv is not None
        return self._described[1:]


class CompiledDensePath(FusedDensePath):
    """Dense MLP and shared expert, and the final sum."""

    def forward(self, x: torch.Tensor) -> DenseOutput:
        x_TD = x.reshape(-1, x.shape[-1]).contiguous()
        dense_size, _, shared_size = self.sizes[:3]
        if self._dense is None:
            projected_TF = self.in_proj(x_TD).contiguous()
            dense_TD = self.dense_down(_swiglu(projected_TF, 0, dense_size))
            shared_TD = self.shared_down(_swiglu(projected_TF, 2 * dense_size, shared_size))
        else:
            projected_TF = x_TD.new_empty((len(x_TD), sum(self.sizes)))
            dense_TD, shared_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
            self._dense.compute(x_TD, projected_TF, dense_TD, shared_TD)
        return _CompiledDenseOutput(dense_TD, shared_TD, projected_TF, 2 * (dense_size + shared_size))

    @functools.cached_property
    def _dense(self) -> CompiledDense | None:
        """The library's arguments, if the layers are packed for it. Built after packing."""
        matrices = packed_matrices(self.in_proj, self.dense_down, self.shared_down)
        if matrices is None:
            return None
        assert isinstance(self.in_proj, PackedLinearLayer)
        return CompiledDense(self.in_proj.packed.dtype, self.sizes[0], self.sizes[2], *matrices)


def _swiglu(projected_TF: torch.Tensor, column: int, inner_size: int) -> torch.Tensor:
    inner_TF = projected_TF.new_empty((projected_TF.shape[0], inner_size))
    swiglu(library(), projected_TF, column, column + inner_size, inner_TF)
    return inner_TF


@dataclass(frozen=True, slots=True)
class _CompiledDenseOutput:
    """Implements `DenseOutput`; see `echovlm_ray.engine.compiled.mix`."""

    dense_TD: torch.Tensor
    shared_TD: torch.Tensor
    projected_TF: torch.Tensor
    factor_column: int

    def mix(self, hidden_states: torch.Tensor, routed_TD: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(hidden_states)
        shape = self.dense_TD.shape
        mix(
            hidden_states.reshape(shape).contiguous(),
            routed_TD.contiguous(),
            self.shared_TD.contiguous(),
            self.dense_TD.contiguous(),
            self.projected_TF,
            self.factor_column,
            output.view(shape),
        )
        return output
