"""Attention for packed sequences in one row, without padding and without a mask."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration

PACKED_ATTENTION = "echovlm_packed"
# In bfloat16 on a CPU with AVX-512, forwards and backwards, 200 tokens take 1.6 ms this way and 3.8 ms by the fused
# kernel; a longer sequence would take too much memory for its probabilities.
_PLAIN_TOKENS = 1024


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
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave queries and keys in float32; fused kernels would round them all the same.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    outputs = []
    for query_T, key_T, value_T in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True):
        length = query_T.shape[2]
        if sliding_window is not None and length > sliding_window:
            allowed = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)
            output, _ = sdpa_attention_forward(module, query_T, key_T, value_T, allowed[None, None], **_known(kwargs))
        elif is_plain_faster(query_T):
            groups = query.shape[1] // key.shape[1]
            key_T, value_T = (part.repeat_interleave(groups, dim=1) for part in (key_T, value_T))
            mask = _causal_mask(query.dtype)[:length, :length]
            output = plain_attention(query_T, key_T, value_T, mask, kwargs.get("scaling")).transpose(1, 2)
        else:
            output, _ = sdpa_attention_forward(module, query_T, key_T, value_T, None, is_causal=True, **_known(kwargs))
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def _known(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in ("scaling", "dropout") if name in kwargs}


def is_plain_faster(query: torch.Tensor) -> bool:
    """Whether two products and a softmax are quicker than torch's fused kernel, whose backward pass is slow here."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] <= _PLAIN_TOKENS


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """Scores, softmax and weighted sum in the dtype of the arguments, also under autocast.

    Args:
        query: … × tokens × head_dim.
        key: like query.
        value: like query.
        mask: tokens × tokens, added to the scores.
        scale: of the scores; None: one over the root of head_dim.

    Returns:
        … × tokens × head_dim.
    """
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.matmul(query * (query.shape[-1] ** -0.5 if scale is None else scale), key.transpose(-1, -2))
        return torch.matmul(F.softmax(scores if mask is None else scores + mask, dim=-1), value)


@lru_cache(maxsize=1)
def _causal_mask(dtype: torch.dtype) -> torch.Tensor:
    return torch.full((_PLAIN_TOKENS, _PLAIN_TOKENS), -torch.inf, dtype=dtype).triu(1)


ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention)


def attend_for_training(model: EchoVLMForConditionalGeneration) -> None:
    """Has a language model attend in this way.

    Its forward then needs `sequence_lengths`, and rows that are not padded.
    """
    model.config.text_config._attn_implementation = PACKED_ATTENTION
