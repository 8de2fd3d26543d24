"""Attention of several sequences that lie one after the other in one row, without padding and without a mask."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration

PACKED_ATTENTION = "echovlm_packed"
PICTURE_ATTENTION = "echovlm_training_pictures"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sequence_lengths: Sequence[int],
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Each token attends to those before it in its own sequence.

    Args:
        module: the attention layer.
        query: 1 × heads × tokens × head_dim.
        key: 1 × key-value heads × tokens × head_dim.
        value: like key.
        attention_mask: None; nothing is padded.
        sequence_lengths: of the sequences, in their order; together all tokens.
        sliding_window: how many tokens back a token sees, itself included; None: all.
        kwargs: scaling and dropout.

    Returns:
        1 × tokens × heads × head_dim, and no attention weights.
    """
    lengths = list(sequence_lengths)
    outputs = []
    for query_T, key_T, value_T in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True):
        length = query_T.shape[2]
        mask = None
        if sliding_window is not None and length > sliding_window:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)
        output, _ = sdpa_attention_forward(
            module,
            query_T,
            key_T,
            value_T,
            None if mask is None else mask[None, None],
            is_causal=mask is None,
            scaling=kwargs.get("scaling"),
            dropout=kwargs.get("dropout", 0.0),
        )
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def picture_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within one picture by torch's fused kernel, which keeps no probabilities for the backward pass.

    `echovlm_ray.model.vision_tower` takes the plain one on a CPU, for the bits of the released model.

    Args:
        module: the attention layer.
        query: 1 × heads × patches × head_dim.
        key: like query.
        value: like query.
        attention_mask: None; a picture sees all of itself.
        kwargs: scaling.

    Returns:
        1 × patches × heads × head_dim, and no attention weights.
    """
    output = F.scaled_dot_product_attention(query, key, value, scale=kwargs.get("scaling"))
    return output.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention)
ALL_ATTENTION_FUNCTIONS.register(PICTURE_ATTENTION, picture_attention)


def attend_for_training(model: EchoVLMForConditionalGeneration) -> None:
    """Has a model attend in these ways; its forward then needs `sequence_lengths`, and rows that are not padded."""
    model.config.text_config._attn_implementation = PACKED_ATTENTION
    if model.model.visual is not None:
        model.model.visual.config._attn_implementation = PICTURE_ATTENTION
