"""Attention over the paged cache.

The tokens of all sequences of a step are concatenated in one row. Every sequence attends to its own cache.
"""

# transformers leaves most of its functions untyped.
# mypy: disable-error-code="no-untyped-call"

from collections.abc import Iterator
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLAttention, rotate_half

from echovlm_ray.engine.compiled import CompiledDecodes, CompiledTokens
from echovlm_ray.engine.concatenate import concatenated
from echovlm_ray.engine.kv_cache import BLOCK_SIZE, KVCache


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence's tokens [start, end) in a step, which are the step's rows from `row` on.

    Tokens from `num_prompt` on were generated before.
    """

    row: int
    start: int
    end: int
    block_table: list[int]
    num_prompt: int


@dataclass(frozen=True, slots=True)
class Tile:
    """Several tokens of one sequence whose attention is computed together.

    Attributes:
        row: the first of the step's rows.
        count: the number of tokens.
        end: the number of the sequence's tokens to which any of them attends.
        mask_QK: 0 where a query may attend and minus infinity elsewhere, in the cache's dtype.
    """

    row: int
    count: int
    end: int
    mask_QK: torch.Tensor


@dataclass(frozen=True, slots=True)
class Prefill:
    """One sequence's tiles, and the cache slots to which they attend."""

    context_slots: torch.Tensor
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """One token each of several sequences, whose contexts are padded to the same length K.

    Attributes:
        row_B: the step's rows; None if they are all rows of the step in order.
        context_slots: B · K.
        mask_B11K: 0 at a sequence's own tokens and minus infinity at the padding, in the cache's dtype.
    """

    row_B: torch.Tensor | None
    context_slots: torch.Tensor
    mask_B11K: torch.Tensor


@dataclass(slots=True)
class AttentionStep:
    """The inputs of a step's attention in addition to queries, keys and values.

    Attributes:
        cache: the KV cache.
        new_slots: the slots of the step's tokens.
        prefills: sequences with several tokens in tiles.
        decodes: single tokens that torch's operators compute.
        compiled_decodes: single tokens that the C library computes.
        compiled_tokens: all tokens for the C library, described by the first layer.
    """

    cache: KVCache
    new_slots: torch.Tensor
    prefills: tuple[Prefill, ...]
    decodes: tuple[DecodeGroup, ...]
    compiled_decodes: CompiledDecodes | None
    compiled_tokens: CompiledTokens | None = None

    @classmethod
    def plan(cls, cache: KVCache, spans: Sequences[SequenceSpan]) -> "AttentionStep":
        """Lays out a step once for all layers.

        On a CPU attention is batch-invariant: a token's result does not depend on the rest of the step, nor on how its
        sequence is split into chunks. A prompt is computed in tiles that begin at multiples of `BLOCK_SIZE`, and each
        generated token separately, also when it is recomputed. Tiles are also faster, because most masked pairs are not
        computed. The C library computes each single token separately. With torch's operators the single tokens of
        several sequences are computed together by the padded length of their contexts, which depends only on the
        sequence. Results are then bitwise equal with one torch thread, as when serving (with more, torch splits float32
        products by the size of the batch).
        """
        new_slots = torch.cat([cache.slots(span.block_table, span.start, span.end) for span in spans])
        prefills: list[Prefill] = []
        decoding: list[SequenceSpan] = []
        for span in spans:
            several: list[SequenceSpan] = []
            for part in _parts(span) if cache.device.type == "cpu" else (span,):
                (decoding if part.end - part.start == 1 else several).append(part)
            if several:
                prefills.append(_prefill(cache, several))
        if cache.compiled:
            return cls(cache, new_slots, tuple(prefills), (), _compiled_decodes(decoding))
        groups: dict[int, list[SequenceSpan]] = {}
        for span in decoding:
            groups.setdefault(padded_context(span.end), []).append(span)
        decodes = tuple(_decode(cache, group, padded, len(new_slots)) for padded, group in groups.items())
        return cls(cache, new_slots.to(cache.device), tuple(prefills), decodes, None)


def padded_context(num_tokens: int) -> int:
    """The padded length of a decoding sequence's context: four sizes between a power of two and the next.

    With few sizes, many sequences are computed together. From 64 tokens on, at most a fifth is padding.
    """
    step = max(BLOCK_SIZE, 1 << (num_tokens - 1).bit_length() >> 3)
    return -(-num_tokens // step) * step


def _parts(span: SequenceSpan) -> Iterator[SequenceSpan]:
    """Splits a span at positions that depend only on a token's index in its sequence."""
    start = span.start
    while start < span.end:
        end = start + 1
        if start < span.num_prompt:
            end = min(start - start % BLOCK_SIZE + BLOCK_SIZE, span.num_prompt, span.end)
        yield SequenceSpan(span.row + start - span.start, start, end, span.block_table, span.num_prompt)
        start = end


def _prefill(cache: KVCache, parts: list[SequenceSpan]) -> Prefill:
    tiles = []
    for part in parts:
        count = part.end - part.start
        mask_QK = torch.zeros(count, part.end, dtype=cache.dtype)
        mask_QK[:, part.start :] = torch.full((count, count), -torch.inf).triu_(diagonal=1)
        tiles.append(Tile(part.row, count, part.end, mask_QK.to(cache.device)))
    slots = cache.slots(parts[-1].block_table, 0, parts[-1].end)
    return Prefill(slots.to(cache.device), tuple(tiles))


def _decode(cache: KVCache, group: list[SequenceSpan], padded: int, num_rows: int) -> DecodeGroup:
    slots_BK = torch.empty(len(group), padded, dtype=torch.int64)
    mask_B11K = torch.zeros(len(group), 1, 1, padded, dtype=cache.dtype)
    for index, span in enumerate(group):
        slots = cache.slots(span.block_table, 0, span.end)
        slots_BK[index, : span.end] = slots
        # Padding refers to the sequence's own slot: other slots may contain NaN, which a mask does not hide.
        slots_BK[index, span.end :] = slots[0]
        mask_B11K[index, 0, 0, span.end :] = -torch.inf
    row_B = None
    if len(group) != num_rows:
        row_B = torch.tensor([span.row for span in group]).to(cache.device)
    return DecodeGroup(row_B, slots_BK.flatten().to(cache.device), mask_B11K.to(cache.device))


def _compiled_decodes(spans: list[SequenceSpan]) -> CompiledDecodes:
    block_tables_BN = np.zeros((len(spans), max((len(span.block_table) for span in spans), default=0)), dtype=np.int64)
    for table_N, span in zip(block_tables_BN, spans, strict=True):
        table_N[: len(span.block_table)] = span.block_table
    rows_B = torch.tensor([span.row for span in spans], dtype=torch.int64)
    lengths_B = torch.tensor([span.end for span in spans], dtype=torch.int64)
    return CompiledDecodes(rows_B, torch.from_numpy(block_tables_BN), lengths_B)


class PagedSelfAttention(nn.Module):
    """Replaces a layer's Qwen2-VL attention: one product for queries, keys and values, and a paged cache."""

    def __init__(self, attention: Qwen2VLAttention) -> None:
        super().__init__()
        assert attention.layer_idx is not None
        self.layer = attention.layer_idx
        self.head_dim = attention.head_dim
        self.num_heads = attention.num_heads
        # Without the field every head has its own keys and values.
        self.num_key_value_heads = attention.num_key_value_heads or attention.num_heads
        self.scaling = attention.scaling
        self.qkv_proj = concatenated([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o_proj = attention.o_proj

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_step: AttentionStep,
    ) -> tuple[torch.Tensor, None]:
        """Stores the tokens' keys and values and computes the attention of each sequence.

        Args:
            hidden_states: 1 × tokens × hidden.
            position_embeddings: cosine and sine, each 1 × tokens × head_dim.
            attention_step: the step's plan and cache.

        Returns:
            1 × tokens × hidden, and no attention weights.
        """
        query_THD = self._store(hidden_states[0], position_embeddings, attention_step)
        attended_THD = _attend(attention_step, self.layer, query_THD, self.scaling)
        projected: torch.Tensor = self.o_proj(attended_THD.view(1, hidden_states.shape[1], -1))
        return projected, None

    def _store(
        self, x_TD: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], step: AttentionStep
    ) -> torch.Tensor:
        heads = (self.num_heads, self.num_key_value_heads)
        qkv_THD = self.qkv_proj(x_TD).view(len(x_TD), -1, self.head_dim)
        rotated_THD, value_THD = qkv_THD.split((sum(heads), heads[1]), dim=1)
        cos, sin = position_embeddings
        rotated_THD = rotated_THD * cos[0, :, None] + rotate_half(rotated_THD) * sin[0, :, None]
        query_THD: torch.Tensor
        query_THD, key_THD = rotated_THD.split(heads, dim=1)
        step.cache.write(self.layer, step.new_slots, key_THD, value_THD)
        return query_THD


def _attend(step: AttentionStep, layer: int, query_THD: torch.Tensor, scaling: float) -> torch.Tensor:
    if not step.prefills and len(step.decodes) == 1:
        return _attend_decoding(step.cache, layer, query_THD, step.decodes[0], scaling)
    output_THD = query_THD.new_empty(query_THD.shape)
    for group in step.decodes:
        assert group.row_B is not None
        rows = query_THD.index_select(0, group.row_B)
        output_THD.index_copy_(0, group.row_B, _attend_decoding(step.cache, layer, rows, group, scaling))
    attend_prefills(step, layer, query_THD, scaling, output_THD)
    return output_THD


def attend_prefills(
    step: AttentionStep, layer: int, query_THD: torch.Tensor, scaling: float, output_THD: torch.Tensor
) -> None:
    """Computes the attention of a step's tiles, whose keys and values were stored before.

    Args:
        step: the step.
        layer: from 0.
        query_THD: the step's tokens × query heads × head_dim.
        scaling: the factor of the scores.
        output_THD: the same shape; the tiles' rows are written.
    """
    for prefill in step.prefills:
        keys_KHD, values_KHD = step.cache.read(layer, prefill.context_slots)
        keys_1HKD, values_1HKD = keys_KHD.transpose(0, 1)[None], values_KHD.transpose(0, 1)[None]
        for tile in prefill.tiles:
            own = slice(tile.row, tile.row + tile.count)
            attended = F.scaled_dot_product_attention(
                query_THD[own].transpose(0, 1)[None],
                keys_1HKD[:, :, : tile.end],
                values_1HKD[:, :, : tile.end],
                attn_mask=tile.mask_QK,
                scale=scaling,
                enable_gqa=True,
            )
            output_THD[own] = attended[0].transpose(0, 1)


def _attend_decoding(
    cache: KVCache, layer: int, query_BHD: torch.Tensor, group: DecodeGroup, scaling: float
) -> torch.Tensor:
    """Grouped-query attention with the query heads of one key-value head as its queries.

    The sum is the same, and on a CPU torch is up to seven times as fast as with one query per head.
    """
    keys, values = cache.read(layer, group.context_slots)
    batch, heads, head_dim = query_BHD.shape
    shape = (batch, -1, keys.shape[1], head_dim)
    attended = F.scaled_dot_product_attention(
        query_BHD.reshape(batch, keys.shape[1], -1, head_dim),
        keys.view(shape).transpose(1, 2),
        values.view(shape).transpose(1, 2),
        attn_mask=group.mask_B11K,
        scale=scaling,
    )
    return attended.reshape(batch, heads, head_dim)
