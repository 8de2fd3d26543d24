"""Attention over the paged cache, as an attention function of transformers.

The tokens of all sequences of a step lie one after the other in one row; every sequence attends to its own cache.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from echovlm_ray.engine.kv_cache import KVCache

PAGED_ATTENTION = "echovlm_paged"


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence's part of a step: rows [start, end) of the queries, and the slots of all keys they may see."""

    start: int
    end: int
    context_slots: torch.Tensor
    # queries × keys, True where a query may look; None where it may look everywhere (decoding).
    mask_QK: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What the attention of one step needs beside queries, keys and values."""

    cache: KVCache
    new_slots: torch.Tensor
    spans: tuple[SequenceSpan, ...]


def span_of(cache: KVCache, block_table: list[int], row: int, start: int, end: int) -> SequenceSpan:
    """The span of a sequence whose tokens [start, end) lie in the step's rows from `row` on."""
    count = end - start
    mask = None
    if count > 1:
        mask = torch.ones(count, end, dtype=torch.bool).tril(diagonal=start)
    slots = cache.slots(block_table, 0, end)
    return SequenceSpan(row, row + count, slots, None if mask is None else mask.to(slots.device))


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    attention_step: AttentionStep,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Stores the step's keys and values, then lets each sequence attend to its own.

    Args:
        module: the attention layer; its `layer_idx` names the part of the cache.
        query: 1 × heads × tokens × head_dim.
        key: 1 × key-value heads × tokens × head_dim.
        value: like key.
        attention_mask: not used; the spans say what is seen.
        scaling: the factor of the scores.
        attention_step: the step's spans and cache.

    Returns:
        1 × tokens × heads × head_dim, and no attention weights.
    """
    layer = module.layer_idx
    assert isinstance(layer, int)
    cache = attention_step.cache
    cache.write(layer, attention_step.new_slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    outputs = []
    for span in attention_step.spans:
        keys_KHD, values_KHD = cache.read(layer, span.context_slots)
        output = F.scaled_dot_product_attention(
            query[:, :, span.start : span.end],
            keys_KHD.transpose(0, 1)[None],
            values_KHD.transpose(0, 1)[None],
            attn_mask=span.mask_QK,
            scale=scaling,
            enable_gqa=True,
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


ALL_ATTENTION_FUNCTIONS.register(PAGED_ATTENTION, paged_attention)
