"""The vision tower's attention and patch embedding for training: images of one size are batched.

transformers splits the patches by picture, attends picture by picture and joins the results; forwards and backwards,
on a CPU, the splitting and joining take longer than the attention. A patch is as large as the convolution's kernel, so
the convolution is a product with the same weights.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed, VisionAttention

from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.training.packed_attention import is_plain_faster, plain_attention


class PictureAttention(nn.Module):
    """Attention within each picture, with the weights of transformers' module and under their names."""

    def __init__(self, attention: VisionAttention) -> None:
        super().__init__()
        # Any module, also with an adapter around it.
        self.qkv = attention.qkv
        self.proj = attention.proj
        self.num_heads = attention.num_heads
        self.scaling = attention.scaling

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Any,
    ) -> torch.Tensor:
        """Takes what transformers' module takes.

        Args:
            hidden_states: patches of all pictures × embedding.
            cu_seqlens: pictures + 1: where each picture begins, and where the last one ends.
            position_embeddings: cosines and sines, patches × head_dim each; their halves are equal.
            kwargs: what only other kinds of attention need.

        Returns:
            patches × embedding.
        """
        lengths = cu_seqlens.diff().tolist()
        queries_keys, values = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).split((2, 1), dim=1)
        queries_keys = _rotate(queries_keys, *position_embeddings)
        if len(set(lengths)) == 1:
            attended = self._attend(
                queries_keys.unflatten(0, (len(lengths), -1)), values.unflatten(0, (len(lengths), -1))
            ).flatten(0, 1)
        else:
            pictures = zip(queries_keys.split(lengths), values.split(lengths), strict=True)
            attended = torch.cat([self._attend(picture[None], value[None])[0] for picture, value in pictures])
        output: torch.Tensor = self.proj(attended.flatten(1))
        return output

    def _attend(self, queries_keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Pictures × patches × 2 × heads × head_dim and pictures × patches × 1 × heads × head_dim.

        Returns:
            pictures × patches × heads × head_dim.
        """
        query, key = queries_keys.permute(2, 0, 3, 1, 4).unbind(0)
        value = values.squeeze(2).transpose(1, 2)
        if is_plain_faster(query):
            output = plain_attention(query, key, value, None, self.scaling)
        else:
            output = F.scaled_dot_product_attention(query, key, value, scale=self.scaling)
        return output.transpose(1, 2)


class PatchProduct(nn.Module):
    """Embeds patches by a matrix product, with the weights of transformers' convolution and under their name."""

    def __init__(self, embed: PatchEmbed) -> None:
        super().__init__()
        self.proj = embed.proj

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Patches × pixels of a patch, to patches × embedding."""
        weight = self.proj.weight
        return F.linear(hidden_states.flatten(1).to(weight.dtype), weight.flatten(1))


def look_for_training(model: EchoVLMForConditionalGeneration) -> None:
    """Puts both into the vision tower of a model, once; the names of its weights stay."""
    visual = model.model.visual
    if visual is None:
        return
    for block in visual.blocks:
        if isinstance(block.attn, VisionAttention):
            block.attn = PictureAttention(block.attn)
    # With an adapter around it, the convolution is more than its weight.
    if isinstance(visual.patch_embed, PatchEmbed) and type(visual.patch_embed.proj) is nn.Conv3d:
        visual.patch_embed = PatchProduct(visual.patch_embed)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in float32, of patches × 2 × heads × head_dim; in the dtype of x."""
    half = x.shape[-1] // 2
    cos, sin = (part[:, None, None, :half].float() for part in (cos, sin))
    first, second = x.float().split(half, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
