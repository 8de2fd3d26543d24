"""EchoVLM on transformers' Qwen2-VL: every decoder layer carries a mixture of experts beside its dense MLP.

Only what differs from Qwen2-VL stands here. The weights keep their released names on disk; `_RELEASED_NAMES` says how
they map to the modules.
"""

# transformers leaves most of its methods untyped.
# mypy: disable-error-code="no-untyped-call"

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2MLP,
    Qwen2VLAttention,
    Qwen2VLDecoderLayer,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen2VLPreTrainedModel,
    Qwen2VLRMSNorm,
    Qwen2VLRotaryEmbedding,
    Qwen2VLTextModel,
)
from transformers.utils.output_capturing import OutputRecorder

from echovlm_ray.model.configuration import EchoVLMConfig, EchoVLMTextConfig
from echovlm_ray.model.experts import EchoVLMExperts, EchoVLMSparseMoe, EchoVLMTokenGate
from echovlm_ray.model.load_balancing import load_balancing_loss
from echovlm_ray.model.positions import batch_positions
from echovlm_ray.model.vision_tower import EchoVLMVisionTower
from router.routed_experts import PendingExperts, RoutedExperts


class MixedWithExperts(Protocol):
    """What stands beside the routed experts of a layer, computed and waiting for them."""

    def mix(self, hidden_states: torch.Tensor, routed_TD: torch.Tensor) -> torch.Tensor:
        """Adds everything to the residual.

        Args:
            hidden_states: … × hidden: the residual.
            routed_TD: tokens × hidden: what the routed experts computed.

        Returns:
            … × hidden.
        """
        ...


@dataclass(frozen=True, slots=True)
class BesideExperts:
    """The parts of a layer's output that need no routed expert; implements `MixedWithExperts`.

    Attributes:
        dense: … × hidden, of the dense MLP.
        shared_TD: tokens × hidden, of the shared expert behind its gate.
        coefficient: … × 2, before the softmax.
    """

    dense: torch.Tensor
    shared_TD: torch.Tensor
    coefficient: torch.Tensor

    def mix(self, hidden_states: torch.Tensor, routed_TD: torch.Tensor) -> torch.Tensor:
        """See `MixedWithExperts.mix`."""
        share = F.softmax(self.coefficient, dim=-1)
        mixture = (routed_TD + self.shared_TD).view_as(self.dense)
        return hidden_states + (share[..., :1] * mixture + share[..., 1:] * self.dense)


class EchoVLMDecoderLayer(Qwen2VLDecoderLayer):
    """Attention, then dense MLP and mixture of experts side by side, mixed by two coefficients per token.

    Attributes:
        attends: set by a runtime that only infers: computes attention and both norms in its own way, from batch ×
            tokens × hidden and what Qwen2-VL's attention takes, to the sum with the residual, and its norm.
        fused: set by a runtime that only infers: computes what stands beside the routed experts in its own way, from
            … × hidden to `MixedWithExperts`.
    """

    def __init__(self, config: EchoVLMTextConfig, layer_idx: int, *, routed_experts: bool = True) -> None:
        GradientCheckpointingLayer.__init__(self)
        self.layer_idx = layer_idx
        self.hidden_size = config.hidden_size
        self.self_attn = Qwen2VLAttention(config, layer_idx)
        self.mlp = Qwen2MLP(config)
        self.moe = EchoVLMSparseMoe(config, routed_experts=routed_experts)
        self.coefficient = nn.Linear(config.hidden_size, 2)
        self.attends: nn.Module | None = None
        self.fused: nn.Module | None = None
        self.input_layernorm = Qwen2VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, *, routed_experts: RoutedExperts | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """One layer: `begin`, then `finish`.

        Args:
            hidden_states: batch × tokens × hidden.
            routed_experts: who computes the routed experts; None: the layer's own.
            kwargs: what Qwen2-VL's attention takes.

        Returns:
            batch × tokens × hidden.
        """
        return self.finish(self.begin(hidden_states, routed_experts=routed_experts, **kwargs))

    def begin(
        self, hidden_states: torch.Tensor, *, routed_experts: RoutedExperts | None = None, **kwargs: Any
    ) -> "LayerUnderWay":
        """Attention, and the routed experts begun: experts elsewhere work while the caller does something else."""
        hidden_states, x = (self.attends or self._attention)(hidden_states, **kwargs)
        pending = (routed_experts or self.moe).begin(self.layer_idx, x.reshape(-1, self.hidden_size))
        return LayerUnderWay(hidden_states, x, pending)

    def finish(self, under_way: "LayerUnderWay") -> torch.Tensor:
        """The dense MLP and the shared expert; only then are the routed experts waited for. Returns as `forward`."""
        beside: MixedWithExperts = (self.fused or self._beside_experts)(under_way.x)
        return beside.mix(under_way.hidden_states, under_way.pending.result())

    def _attention(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states, self.post_attention_layernorm(hidden_states)

    def _beside_experts(self, x: torch.Tensor) -> BesideExperts:
        return BesideExperts(self.mlp(x), self.moe.shared(x.reshape(-1, self.hidden_size)), self.coefficient(x))


@dataclass(frozen=True, slots=True)
class LayerUnderWay:
    """A layer between `begin` and `finish`.

    Attributes:
        hidden_states: batch × tokens × hidden, after the attention's residual sum.
        x: the same, after the post-attention norm.
        pending: its routed experts.
    """

    hidden_states: torch.Tensor
    x: torch.Tensor
    pending: PendingExperts


@dataclass(frozen=True, slots=True)
class ForwardPart:
    """One of several forward passes that go through the layers side by side.

    Attributes:
        inputs_embeds: batch × tokens × hidden.
        position_ids: 3 × batch × tokens.
        routed_experts: who computes its routed experts.
        attention: what the attention function in use takes beside queries, keys and values.
    """

    inputs_embeds: torch.Tensor
    position_ids: torch.Tensor
    routed_experts: RoutedExperts
    attention: dict[str, Any]


class EchoVLMPreTrainedModel(Qwen2VLPreTrainedModel):
    """What the language model and the whole model share."""

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
        """The loop is the default: transformers' own default may depend on the batch, and on the machine."""
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
        """Several forward passes without a mask or a cache of transformers, layer by layer in turn.

        In each layer the routed experts of all parts are begun before any is waited for, so that the experts of one
        part work during the attention of the next. The arithmetic is that of `forward`.

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


class EchoVLMModel(EchoVLMPreTrainedModel, Qwen2VLModel):
    """Vision tower and language model. Keeps no state of a request: positions are computed from what is passed."""

    config: EchoVLMConfig

    def __init__(self, config: EchoVLMConfig, *, vision: bool = True, routed_experts: bool = True) -> None:
        Qwen2VLPreTrainedModel.__init__(self, config)
        self.visual = EchoVLMVisionTower(config.vision_config) if vision else None
        self.language_model = EchoVLMTextModel(config.text_config, routed_experts=routed_experts)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        rope_deltas: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Qwen2-VL's, with `rope_deltas` (batch × 1) going in and out instead of staying on the module.

        Args:
            input_ids: batch × tokens.
            attention_mask: batch × tokens, 0 at padding.
            position_ids: given, nothing is computed.
            past_key_values: the cache.
            inputs_embeds: instead of input_ids.
            image_grid_thw: images × 3.
            video_grid_thw: videos × 3.
            rope_deltas: what the call that began the cache returned; needed to go on from it without position_ids.
            mm_token_type_ids: not needed; input_ids say where the pictures are.
            kwargs: pixels, and what the language model takes.

        Raises:
            PlaceholderMismatchError: placeholder tokens and pictures do not fit.
            ValueError: a cache is continued without position_ids and rope_deltas.
        """
        if position_ids is None:
            position_ids, rope_deltas = self._positions(
                input_ids,
                inputs_embeds,
                attention_mask,
                image_grid_thw,
                video_grid_thw,
                0 if past_key_values is None else past_key_values.get_seq_length(),
                rope_deltas,
            )
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            **kwargs,
        )
        outputs["rope_deltas"] = rope_deltas
        return outputs

    def _positions(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        image_grids: torch.Tensor | None,
        video_grids: torch.Tensor | None,
        past_length: int,
        rope_deltas: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens_BT = input_ids if input_ids is not None else inputs_embeds
        if tokens_BT is None:
            raise ValueError("give input_ids or inputs_embeds")
        batch, length = tokens_BT.shape[:2]
        if past_length or input_ids is None:
            if rope_deltas is None:
                raise ValueError(
                    "positions cannot be told from a cache or from inputs_embeds alone: pass position_ids, or the "
                    "rope_deltas that the call which began the cache returned"
                )
            index_T = torch.arange(past_length, past_length + length, device=tokens_BT.device)
            return (index_T + rope_deltas).expand(3, batch, length), rope_deltas
        return batch_positions(input_ids, attention_mask, image_grids, video_grids, self.config)


@dataclass
class EchoVLMOutputWithPast(MoeCausalLMOutputWithPast):
    """What a forward pass returns.

    Attributes:
        rope_deltas: batch × 1: the token at index i of the (padded) row stands at `i + rope_deltas`. Pass it back to
            go on from `past_key_values`.
    """

    rope_deltas: torch.Tensor | None = None


class EchoVLMForConditionalGeneration(EchoVLMPreTrainedModel, Qwen2VLForConditionalGeneration):
    """EchoVLM with its language-model head: `from_pretrained`, `forward`, `generate`, `save_pretrained`.

    Args of the constructor: the configuration; whether to have a vision tower; whether to have routed experts.
    """

    config: EchoVLMConfig
    if TYPE_CHECKING:
        # transformers' own signature does not admit the model's inputs.
        generate: Any

    def __init__(self, config: EchoVLMConfig, *, vision: bool = True, routed_experts: bool = True) -> None:
        Qwen2VLPreTrainedModel.__init__(self, config)
        self.model = EchoVLMModel(config, vision=vision, routed_experts=routed_experts)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str] | None,
        *args: Any,
        organ: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads a checkpoint in the released layout, or a split folder together with its experts.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the Hugging Face hub.
            args: as in transformers.
            organ: of a split folder whose organs have an expert group each: whose experts to take.
            kwargs: as in transformers (dtype, device_map, …).

        Raises:
            CheckpointMismatchError: a tensor is missing, unexpected or of another shape; all are named.
            ValueError: an organ is needed, unknown, or makes no sense for this checkpoint; the organs are listed.
        """
        # checkpoint.py builds models, so it stands above this file.
        from echovlm_ray.model.checkpoint import prepare_pretrained, require_complete

        path, kwargs = prepare_pretrained(pretrained_model_name_or_path, organ, kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        require_complete(info)
        return (model, info) if wants_info else model

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        rope_deltas: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        output_router_logits: bool | None = None,
        routed_experts: RoutedExperts | None = None,
        **kwargs: Any,
    ) -> EchoVLMOutputWithPast:
        """As Qwen2-VL's, and:

        Args:
            output_router_logits: also return every layer's router logits, and the load-balancing loss, which joins
                the loss with the factor `router_aux_loss_coef`; None: as the configuration says.
            routed_experts: who computes the routed experts; None: the model's own.
            rope_deltas: see `EchoVLMModel.forward`.
            mm_token_type_ids: not needed.

        Returns:
            logits batch × tokens (or `logits_to_keep`) × vocabulary; with labels the loss.
        """
        text_config = self.config.text_config
        if output_router_logits is None:
            output_router_logits = text_config.output_router_logits
        if output_router_logits and routed_experts is not None:
            raise ValueError("output_router_logits needs the model's own experts: call forward without routed_experts")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            rope_deltas=rope_deltas,
            mm_encoder_outputs=mm_encoder_outputs,
            output_router_logits=output_router_logits,
            routed_experts=routed_experts,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text_config.vocab_size, **kwargs)
        if output_router_logits:
            aux_loss = load_balancing_loss(outputs.router_logits, text_config.num_experts_per_tok, attention_mask)
            if loss is not None:
                loss = loss + text_config.router_aux_loss_coef * aux_loss.to(loss.device)
        return EchoVLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
            rope_deltas=outputs.rope_deltas,
        )

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        # Four rows: the plain index, from which transformers tells packed rows, then time, height and width.
        plain_BT = super(Qwen2VLForConditionalGeneration, self)._prepare_position_ids_for_generation(
            inputs_tensor, model_kwargs
        )
        input_ids = model_kwargs.get("input_ids")
        if input_ids is None or not input_ids.shape[1]:
            input_ids = inputs_tensor
        if input_ids.is_floating_point():
            raise ValueError("generate needs input_ids: inputs_embeds alone do not tell where the pictures are")
        positions_3BT, _ = batch_positions(
            input_ids,
            model_kwargs.get("attention_mask"),
            model_kwargs.get("image_grid_thw"),
            model_kwargs.get("video_grid_thw"),
            self.config,
        )
        return torch.cat([plain_BT.expand(1, *input_ids.shape), positions_3BT])

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        before = model_kwargs.get("position_ids")
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if before is not None and before.ndim == 3:
            after = model_kwargs["position_ids"]
            new = after.shape[-1] - before.shape[-1]
            # A prompt that ends in a picture goes on behind the largest coordinate, the same in all three.
            last_B1 = before[1:, :, -1:].amax(dim=0)
            after[1:, :, -new:] = last_B1 + torch.arange(1, new + 1, device=after.device)
        return model_kwargs


# The names that the weights have on disk, and how they become modules: read forwards by from_pretrained, backwards by
# save_pretrained.
_RELEASED_NAMES: list[WeightConverter | WeightRenaming] = [
    WeightRenaming(source_patterns=r"^visual", target_patterns="model.visual"),
    WeightRenaming(source_patterns=r"^model(?!\.(language_model|visual))", target_patterns="model.language_model"),
    WeightConverter(
        source_patterns=["moe.experts.*.gate_proj.weight", "moe.experts.*.up_proj.weight"],
        target_patterns="moe.experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    ),
    WeightConverter(
        source_patterns="moe.experts.*.down_proj.weight",
        target_patterns="moe.experts.down_proj",
        operations=[MergeModulelist(dim=0)],
    ),
]
register_checkpoint_conversion_mapping(EchoVLMForConditionalGeneration.__name__, _RELEASED_NAMES, overwrite=True)
