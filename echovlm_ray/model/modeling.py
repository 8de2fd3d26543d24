"""EchoVLM on transformers' Qwen2-VL: every decoder layer has a mixture of experts in addition to its dense MLP.

The differences from Qwen2-VL are here, in `text_model.py` and in `decoder_layer.py`. The weights keep their released
names on disk; `_RELEASED_NAMES` maps them to the modules.
"""

# transformers leaves most of its methods untyped.
# mypy: disable-error-code="no-untyped-call"

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen2VLPreTrainedModel,
)

from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.model.load_balancing import load_balancing_loss
from echovlm_ray.model.positions import batch_positions
from echovlm_ray.model.pretrained import prepare_pretrained, require_complete
from echovlm_ray.model.text_model import EchoVLMPreTrainedModel, EchoVLMTextModel
from echovlm_ray.model.vision_tower import EchoVLMVisionTower
from router.dispatch.routed_experts import RoutedExperts


class EchoVLMModel(EchoVLMPreTrainedModel, Qwen2VLModel):
    """Vision tower and language model. Stateless: positions are computed from the arguments."""

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
        """Like Qwen2-VL's, but `rope_deltas` (batch × 1) is an argument and a result instead of state of the module.

        Args:
            input_ids: batch × tokens.
            attention_mask: batch × tokens, 0 at padding.
            position_ids: if given, positions are not computed.
            past_key_values: the cache.
            inputs_embeds: instead of input_ids.
            image_grid_thw: images × 3.
            video_grid_thw: videos × 3.
            rope_deltas: the result of the call that began the cache; needed to continue it without position_ids.
            mm_token_type_ids: ignored; input_ids have the positions of the images.
            kwargs: pixels, and arguments of the language model.

        Raises:
            PlaceholderMismatchError: placeholder tokens and images do not match.
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
                    "positions cannot be computed from a cache or from inputs_embeds alone: pass position_ids, or the "
                    "rope_deltas that the call which began the cache returned"
                )
            index_T = torch.arange(past_length, past_length + length, device=tokens_BT.device)
            return (index_T + rope_deltas).expand(3, batch, length), rope_deltas
        return batch_positions(input_ids, attention_mask, image_grids, video_grids, self.config)


@dataclass
class EchoVLMOutputWithPast(MoeCausalLMOutputWithPast):
    """The result of a forward pass.

    Attributes:
        rope_deltas: batch × 1: the token at index i of the (padded) row has the position `i + rope_deltas`. Pass it to
            continue from `past_key_values`.
    """

    rope_deltas: torch.Tensor | None = None


class EchoVLMForConditionalGeneration(EchoVLMPreTrainedModel, Qwen2VLForConditionalGeneration):
    """EchoVLM with its language-model head: `from_pretrained`, `forward`, `generate`, `save_pretrained`.

    Constructor arguments: the configuration; whether to have a vision tower; whether to have routed experts.
    """

    config: EchoVLMConfig
    if TYPE_CHECKING:
        # transformers' signature does not allow the model's inputs.
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
            organ: the organ whose experts are loaded, for a split folder with an expert group for each organ.
            kwargs: as in transformers (dtype, device_map, …).

        Raises:
            CheckpointMismatchError: a tensor is missing, unexpected or of another shape; all are named.
            ValueError: an organ is missing, unknown, or not applicable to this checkpoint; the text lists the organs.
        """
        path, kwargs = prepare_pretrained(pretrained_model_name_or_path, organ, kwargs, cls)
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
            routed_experts: computes the routed experts; None for the model's own.
            rope_deltas: see `EchoVLMModel.forward`.
            mm_token_type_ids: ignored.

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
        # Four rows: the index, by which transformers recognises packed rows, then time, height and width.
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
            # A prompt that ends in an image continues after the largest coordinate, in all three dimensions.
            last_B1 = before[1:, :, -1:].amax(dim=0)
            after[1:, :, -new:] = last_B1 + torch.arange(1, new + 1, device=after.device)
        return model_kwargs


# Maps the names on disk to modules; from_pretrained uses it, and save_pretrained its inverse.
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
