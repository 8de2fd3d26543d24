"""The tensors that an EchoVLM checkpoint must have, from its config.json, and their groups.

The names are those of the released layout (state dict of the reference implementation on Qwen2-VL).
"""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from echovlm_ray.checkpoint.layout import InvalidCheckpointError
from experts.bundles.digest import digest_of

# In the order in which `inspect` lists them.
PARTS = (
    "vision",
    "embeddings",
    "attention",
    "dense MLP",
    "routed experts",
    "gates",
    "shared experts",
    "coefficients",
    "norms",
    "lm_head",
)
# The reference's config class drops `num_experts` and always builds four.
_REFERENCE_EXPERTS = 4

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.moe\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_GATE = re.compile(r"model\.layers\.(\d+)\.moe\.gate\.weight")


class VisionShape(BaseModel):
    """The vision tower's sizes. Fields that are not in config.json have Qwen2-VL's defaults."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    depth: int = Field(default=32, ge=1)
    embed_dim: int = Field(default=1280, ge=1)
    hidden_size: int = Field(default=3584, ge=1)
    mlp_ratio: float = Field(default=4, gt=0)
    num_heads: int = Field(default=16, ge=1)
    in_channels: int = Field(default=3, ge=1)
    patch_size: int = Field(default=14, ge=1)
    spatial_merge_size: int = Field(default=2, ge=1)
    temporal_patch_size: int = Field(default=2, ge=1)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor under `visual.`."""
        embed, inner = self.embed_dim, int(self.embed_dim * self.mlp_ratio)
        merged = embed * self.spatial_merge_size**2
        patch = (self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size)
        shapes: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (embed, *patch)}
        for block in range(self.depth):
            prefix = f"visual.blocks.{block}"
            for norm in ("norm1", "norm2"):
                shapes |= {f"{prefix}.{norm}.weight": (embed,), f"{prefix}.{norm}.bias": (embed,)}
            shapes |= _linear(f"{prefix}.attn.qkv", 3 * embed, embed) | _linear(f"{prefix}.attn.proj", embed, embed)
            shapes |= _linear(f"{prefix}.mlp.fc1", inner, embed) | _linear(f"{prefix}.mlp.fc2", embed, inner)
        shapes |= {"visual.merger.ln_q.weight": (embed,), "visual.merger.ln_q.bias": (embed,)}
        return (
            shapes
            | _linear("visual.merger.mlp.0", merged, merged)
            | _linear("visual.merger.mlp.2", self.hidden_size, merged)
        )


class ModelShape(BaseModel):
    """The sizes in a config.json that determine the tensors."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    tie_word_embeddings: bool = False
    num_experts: int = Field(default=_REFERENCE_EXPERTS, ge=1)
    num_experts_per_tok: int | None = Field(default=None, ge=1)
    # None in a stock Qwen2-VL, which has neither experts nor coefficients.
    moe_intermediate_size: int | None = Field(default=None, ge=1)
    shared_expert_intermediate_size: int | None = Field(default=None, ge=1)
    vision: VisionShape = VisionShape()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Reads the sizes, from the top level (as released) or from `text_config` (as newer transformers nest them).

        Raises:
            InvalidCheckpointError: a size is missing or impossible; names the field.
        """
        text = config.get("text_config")
        merged = {**(text if isinstance(text, dict) else {}), **config}
        merged.setdefault("num_key_value_heads", merged.get("num_attention_heads"))
        try:
            shape = cls(**merged, vision=VisionShape(**(config.get("vision_config") or {})))
        except (ValidationError, TypeError) as error:
            raise InvalidCheckpointError(f"config.json: {_first_reason(error)}") from None
        if shape.hidden_size % shape.num_attention_heads:
            raise InvalidCheckpointError(
                f"config.json: hidden_size {shape.hidden_size} cannot be divided among "
                f"num_attention_heads {shape.num_attention_heads}"
            )
        if shape.num_experts_per_tok is not None and shape.num_experts_per_tok > shape.num_experts:
            raise InvalidCheckpointError(
                f"config.json: num_experts_per_tok {shape.num_experts_per_tok} "
                f"is more than num_experts {shape.num_experts}"
            )
        return shape

    @property
    def has_experts(self) -> bool:
        """Whether the config describes an EchoVLM rather than a stock Qwen2-VL."""
        return self.moe_intermediate_size is not None and self.shared_expert_intermediate_size is not None

    def backbone_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of everything but the token gates and the routed experts."""
        hidden = self.hidden_size
        shapes = self.vision.tensors()
        shapes |= {"model.embed_tokens.weight": (self.vocab_size, hidden), "model.norm.weight": (hidden,)}
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        key_value = hidden // self.num_attention_heads * self.num_key_value_heads
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            shapes |= {f"{prefix}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
            shapes |= _linear(f"{prefix}.self_attn.q_proj", hidden, hidden)
            shapes |= _linear(f"{prefix}.self_attn.k_proj", key_value, hidden)
            shapes |= _linear(f"{prefix}.self_attn.v_proj", key_value, hidden)
            shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, hidden)
            shapes |= _swiglu(f"{prefix}.mlp", hidden, self.intermediate_size)
            if self.has_experts:
                assert self.shared_expert_intermediate_size is not None
                shapes |= _swiglu(f"{prefix}.moe.shared_expert", hidden, self.shared_expert_intermediate_size)
                shapes[f"{prefix}.moe.shared_expert_gate.weight"] = (1, hidden)
                shapes |= _linear(f"{prefix}.coefficient", 2, hidden)
        return shapes

    def routed_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of the token gates and the routed experts; empty for a stock Qwen2-VL."""
        if self.moe_intermediate_size is None or not self.has_experts:
            return {}
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.num_hidden_layers):
            shapes[gate_name(layer)] = (self.num_experts, self.hidden_size)
            for expert in range(self.num_experts):
                prefix = f"model.layers.{layer}.moe.experts.{expert}"
                shapes |= _swiglu(prefix, self.hidden_size, self.moe_intermediate_size)
        return shapes


def gate_name(layer: int) -> str:
    """The released name of a layer's token gate."""
    return f"model.layers.{layer}.moe.gate.weight"


def expert_name(layer: int, expert: int, projection: str) -> str:
    """The released name of one matrix of a routed expert; projection is gate_proj, up_proj or down_proj."""
    return f"model.layers.{layer}.moe.experts.{expert}.{projection}.weight"


def is_routed(name: str) -> bool:
    """Whether a tensor goes into the bundles (token gates and routed experts) rather than the backbone."""
    return bool(_EXPERT.fullmatch(name) or _GATE.fullmatch(name))


def part_of(name: str) -> str | None:
    """Which of `PARTS` a tensor belongs to; None for a name that no EchoVLM has."""
    if name.startswith("visual."):
        return "vision"
    named = {"model.embed_tokens.weight": "embeddings", "model.norm.weight": "norms", "lm_head.weight": "lm_head"}
    if name in named:
        return named[name]
    if _EXPERT.fullmatch(name):
        return "routed experts"
    if _GATE.fullmatch(name):
        return "gates"
    if not (match := _LAYER.fullmatch(name)):
        return None
    inside = match.group(2)
    prefixes = {
        "self_attn.": "attention",
        "mlp.": "dense MLP",
        "moe.shared_expert": "shared experts",
        "coefficient.": "coefficients",
        "input_layernorm.": "norms",
        "post_attention_layernorm.": "norms",
    }
    return next((part for prefix, part in prefixes.items() if inside.startswith(prefix)), None)


def backbone_digest(config: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...], str]]) -> str:
    """A backbone's identity, which does not depend on the files of its tensors.

    Args:
        config: the parsed config.json; only its sizes count, with Qwen2-VL's defaults filled in.
        tensors: of every backbone tensor its safetensors dtype, shape, and the SHA-256 of its bytes.
    """
    sizes = ModelShape.from_config(config).model_dump(
        mode="json", exclude={"num_experts", "num_experts_per_tok", "moe_intermediate_size"}
    )
    listed = {name: [dtype, list(shape), digest] for name, (dtype, shape, digest) in tensors.items()}
    return digest_of({"config": sizes, "tensors": listed})


def _linear(prefix: str, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.weight": (out_features, in_features), f"{prefix}.bias": (out_features,)}


def _swiglu(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }


def _first_reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        return f"{field}: {first['msg']}"
    return "vision_config must be a mapping"
