"""The language model of EchoVLM: token embeddings, decoder layers and the final norm."""

# transformers leaves most of its methods untyped.
# mypy: disable-error-code="no-untyped-call"

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLAttention,
    Qwen2VLPreTrainedModel,
    Qwen2VLRMSNorm,
    Qwen2VLRotaryEmbedding,
    Qwen2VLTextModel,
)
from transformers.utils.output_capturing import OutputRecorder

from echovlm_ray.model.configuration import EchoVLMTextConfig
from echovlm_ray.model.decoder_layer import EchoVLMDecoderLayer
from echovlm_ray.model.experts import EchoVLMExperts, EchoVLMTokenGate
from router.dispatch.routed_experts import RoutedExperts


@dataclass(frozen=True, slots=True)
class ForwardPart:
    """One of several forward passes that are computed layer by layer together.

    Attributes:
        inputs_embeds: batch × tokens × hidden.
        position_ids: 3 × batch × tokens.
        routed_experts: computes its routed experts.
        attention: further arguments of the attention function.
    """

    inputs_embeds: torch.Tensor
    position_ids: torch.Tensor
    routed_experts: RoutedExperts
    attention: dict[str, Any]


class EchoVLMPreTrainedModel(Qwen2VLPreTrainedModel):
    """The base class of the language model and the whole model."""

    _no_split_modules = ["EchoVLMDecoderLayer", "Qwen2VLVisionBlock"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.get_text_config().initializer_range
        if isinstance(module, EchoVLMTokenGate):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, EchoVLMExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The loop is the default, because transformers' default may depend on the batch and on the machine."""
        return super().get_correct_experts_implementation(requested_experts or "eager")


class EchoVLMTextModel(EchoVLMPreTrainedModel, Qwen2VLTextModel):
    """The language model; `routed_experts=` in forward reaches every layer."""

    config: EchoVLMTextConfig
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": EchoVLMDecoderLayer,
        "attentions": Qwen2VLAttention,
        "router_logits": OutputRecorder(EchoVLMTokenGate, index=0),
    }

    def __init__(self, config: EchoVLMTextConfig, *, routed_experts: bool = True) -> None:
        Qwen2VLPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            EchoVLMDecoderLayer(config, layer, routed_experts=routed_experts)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = Qwen2VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.has_sliding_layers = "sliding_attention" in config.layer_types
        self.rotary_emb = Qwen2VLRotaryEmbedding(config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()

    def forward_side_by_side(self, parts: Sequence[ForwardPart]) -> list[torch.Tensor]:
        """Computes several forward passes alternately in each layer, without transformers' mask and cache.

        In each layer the routed experts of all parts are started before the first result is awaited, so that the
        experts of one part overlap with the attention of the next. The arithmetic is that of `forward`.

        Returns:
            each part's last hidden states, batch × tokens × hidden.
        """
        hidden_states = [part.inputs_embeds for part in parts]
        position_embeddings = [self.rotary_emb(part.inputs_embeds, part.position_ids) for part in parts]
        for layer in self.layers:
            assert isinstance(layer, EchoVLMDecoderLayer)
            under_way = [
                layer.begin(hidden, routed_experts=part.routed_experts, position_embeddings=positions, **part.attention)
                for hidden, part, positions in zip(hidden_states, parts, position_embeddings, strict=True)
            ]
            hidden_states = [layer.finish(begun) for begun in under_way]
        return [self.norm(hidden) for hidden in hidden_states]
