"""Qwen2-VL's vision tower, with the attention arithmetic that EchoVLM was released with."""

# transformers leaves most of its methods untyped.
# mypy: disable-error-code="no-untyped-call"

from typing import Any

import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

VISION_ATTENTION = "echovlm_vision"


def vision_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within one picture.

    On a CPU torch picks its fused kernel for four dimensions and the plain one for three. The fused one rounds the
    probabilities to bfloat16 before it applies them; in a small model that is enough to flip an expert. The released
    code passes three, so do we.

    Args:
        module: the attention layer.
        query: 1 × heads × patches × head_dim.
        key: like query.
        value: like query.
        attention_mask: always None; a picture sees all of itself.
        kwargs: scaling, and what transformers passes along.

    Returns:
        1 × patches × heads × head_dim, and no attention weights.
    """
    if query.device.type != "cpu" or attention_mask is not None or kwargs.get("dropout"):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    output = F.scaled_dot_product_attention(query[0], key[0], value[0], scale=kwargs.get("scaling"))
    return output.transpose(0, 1)[None], None


ALL_ATTENTION_FUNCTIONS.register(VISION_ATTENTION, vision_attention)


class EchoVLMVisionTower(Qwen2VisionTransformerPretrainedModel):
    """Patches in, one embedding per merged patch out (`pooler_output`)."""

    def __init__(self, config: Qwen2VLVisionConfig) -> None:
        super().__init__(config)
        # Only in place of the default: another implementation that was asked for stays.
        if config._attn_implementation == "sdpa":
            config._attn_implementation = VISION_ATTENTION
