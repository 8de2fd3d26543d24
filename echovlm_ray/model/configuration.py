"""The model's configuration: Qwen2-VL's plus the fields of the experts, on disk in the released layout.

In memory the text fields are in `text_config`, as in transformers 5. In `config.json` they are flat, with `model_type:
qwen2_vl`, as in EchoVLM's release. Both formats are read; the released one is written.
"""

# transformers leaves most of its methods untyped.
# mypy: disable-error-code="no-untyped-call"

import copy
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig, Qwen2VLTextConfig, Qwen2VLVisionConfig

# The class in the released config.json.
RELEASED_ARCHITECTURE = "Qwen2VLMOEForConditionalGeneration"
# Fields of a sub-configuration that the released layout has at the top level, derives, or does not have.
_NOT_RELEASED = frozenset(
    {
        "architectures",
        "dtype",
        "layer_types",
        "model_type",
        "rope_parameters",
        "text_config",
        "tie_word_embeddings",
        "transformers_version",
        "vision_config",
    }
)


@strict
class EchoVLMTextConfig(Qwen2VLTextConfig):
    """Qwen2-VL's language model with a mixture of experts in every layer.

    The defaults are the released sizes. `num_experts` and `router_aux_loss_coef` are used, unlike in EchoVLM's released
    class.

    Raises:
        ValueError: a size is invalid, or `mrope_section` does not fill half a head.
    """

    if TYPE_CHECKING:
        # Fields that transformers sets when the configuration is complete.
        rope_parameters: dict[str, Any]
        layer_types: list[str]

    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 1408
    shared_expert_intermediate_size: int = 5632
    # Whether a token's weights are scaled to add up to 1; the released weights were trained without it.
    norm_topk_prob: bool = False
    # Whether forward returns the router's logits and, from them, the load-balancing loss.
    output_router_logits: bool = False
    # The coefficient of the load-balancing loss.
    router_aux_loss_coef: float | int = 0.001

    def __post_init__(self, **kwargs: Any) -> None:
        """Keeps the file's sliding window, and sets Qwen2-VL's mrope section if there is none."""
        # Qwen2-VL drops the window when it is not in use; it is kept here to be written back.
        unused_window = None if self.use_sliding_window else self.sliding_window
        super().__post_init__(**kwargs)
        if unused_window is not None:
            self.unused_sliding_window = unused_window
        if "mrope_section" not in self.rope_parameters:
            self.rope_parameters["mrope_section"] = self._default_mrope_section()
        self._check_mrope_section()
        self._check_experts()

    def _default_mrope_section(self) -> list[int]:
        # Qwen2-VL's proportions, 16 : 24 : 24 of 64.
        half = self.hidden_size // self.num_attention_heads // 2
        if half % 8:
            raise ValueError(
                f"rope_scaling names no mrope_section and there is no default for half a head of {half}: "
                "give three numbers (time, height, width) that add up to it"
            )
        return [half // 4, half * 3 // 8, half * 3 // 8]

    def _check_mrope_section(self) -> None:
        section = self.rope_parameters["mrope_section"]
        half = self.hidden_size // self.num_attention_heads // 2
        if len(section) != 3 or sum(section) != half:
            raise ValueError(
                f"rope_scaling.mrope_section is {section}: three numbers that add up to {half} "
                "(half of hidden_size / num_attention_heads) are needed"
            )

    def _check_experts(self) -> None:
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act is {self.hidden_act!r}: EchoVLM's experts are SwiGLU, which needs 'silu'")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}: it must lie between 1 and num_experts, "
                f"which is {self.num_experts}"
            )


@strict
class EchoVLMConfig(Qwen2VLConfig):
    """The model's configuration. Text fields may be flat, as in the released `config.json`."""

    if TYPE_CHECKING:
        text_config: EchoVLMTextConfig
        vision_config: Qwen2VLVisionConfig

    # As in the released files; an EchoVLM differs from a Qwen2-VL by its `moe` tensors.
    model_type = "qwen2_vl"
    sub_configs_defaults = {"vision_config": Qwen2VLVisionConfig, "text_config": EchoVLMTextConfig}  # type: ignore[dict-item]  # noqa: RUF012

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, except that a text field among the keyword arguments overrides the file's."""
        overrides = take_text_fields(kwargs)
        # transformers modifies its argument.
        config_dict = copy.deepcopy(config_dict)
        flat = config_dict if config_dict.get("text_config") is None else config_dict["text_config"]
        flat.update(overrides)
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """The dict for `save_pretrained`: the released layout with flat text fields."""
        released = _set_fields(self)
        released |= _set_fields(self.text_config)
        rope = dict(self.text_config.rope_parameters)
        released["rope_theta"] = rope.pop("rope_theta")
        released["rope_scaling"] = rope
        if (window := released.pop("unused_sliding_window", None)) is not None:
            released["sliding_window"] = window
        released["vision_config"] = _set_fields(self.vision_config)
        released["architectures"] = [RELEASED_ARCHITECTURE]
        released["model_type"] = self.model_type
        released["tie_word_embeddings"] = self.tie_word_embeddings
        if self.dtype is not None:
            released["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        released["transformers_version"] = self.to_dict()["transformers_version"]
        return released


def take_text_fields(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Removes the language model's own fields from keyword arguments, and returns them."""
    fields = EchoVLMTextConfig.default_config_fields().keys() - EchoVLMConfig.default_config_fields().keys()
    return {name: kwargs.pop(name) for name in fields & kwargs.keys()}


def _set_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration's fields; those of the base class only if they differ from their default."""
    common = PreTrainedConfig().to_dict()
    return {
        name: value
        for name, value in config.to_dict().items()
        if name not in _NOT_RELEASED and not name.startswith("_") and (name not in common or value != common[name])
    }
