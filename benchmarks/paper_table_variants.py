"""The models that the paper's comparison sets side by side, built of the project's model and its configuration.

What a configuration cannot say is said by modules that take the place of a layer's: no experts at all (then a layer
computes what Qwen2-VL's does), no shared expert, and experts that belong to organs.
"""

# transformers leaves most of its methods untyped.
# mypy: disable-error-code="no-untyped-call"

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from echovlm_ray.model.checkpoint import load_vision_tower
from echovlm_ray.model.configuration import EchoVLMConfig, EchoVLMTextConfig
from echovlm_ray.model.decoder_layer import EchoVLMDecoderLayer
from echovlm_ray.model.experts import EchoVLMTokenGate
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.training.objective import TrainingObjective
from router.gating.token_gate import choose_experts

BASELINE, MOE = "dense", "moe"


@dataclass(frozen=True, slots=True)
class Variant:
    """One model of the comparison.

    Attributes:
        name: for options and files.
        title: for tables.
        experts: how many routed experts a layer has, of each organ where they belong to organs; 0: none.
        top_k: the number of them per token.
        shared: whether there is a shared expert.
        by_organ: whether each organ has separate experts and gate rows.
        as_large: whether the dense MLP is widened to the parameters of the MoE.
        groups: whether there are as many routed experts as with `by_organ`.
    """

    name: str
    title: str
    experts: int = 4
    top_k: int = 2
    shared: bool = True
    by_organ: bool = False
    as_large: bool = False
    groups: bool = False


VARIANTS = (
    Variant(BASELINE, "dense Qwen2-VL", experts=0),
    Variant("dense-large", "dense, as many parameters as the MoE", experts=0, as_large=True),
    Variant(MOE, "EchoVLM's MoE: 4 experts, top-2, shared"),
    Variant("top-1", "MoE, top-1", top_k=1),
    Variant("no-shared", "MoE without the shared expert", shared=False),
    Variant("by-organ", "MoE, organ-gated: 4 experts for each organ", by_organ=True, groups=True),
    Variant("ungated-large", "MoE, ungated, as many experts as organ-gated", groups=True),
)


@dataclass(frozen=True, slots=True)
class Size:
    """What a variant costs.

    Attributes:
        total: parameters, vision tower included.
        active: those that a token of the language model meets.
    """

    total: int
    active: int


class OrganGate(EchoVLMTokenGate):
    """A gate whose rows belong to organs: a token uses only its organ's experts, as in `routing: organs`.

    Attributes:
        organ_T: int64, the organ of each token, or of all of them in one number; set before each forward pass.
    """

    def __init__(self, config: EchoVLMTextConfig, organs: int) -> None:
        super().__init__(config)
        self._organs = organs
        self.organ_T = torch.zeros(1, dtype=torch.int64)

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns logits tokens × experts of an organ, weights and indices tokens × top_k."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TGE = F.linear(x_TD.float(), self.weight.float()).unflatten(-1, (self._organs, -1))
            organ_T = self.organ_T.expand(len(x_TD))
            logits_TE = logits_TGE[torch.arange(len(x_TD)), organ_T]
            weight_TK, index_TK = choose_experts(logits_TE, self.top_k, self.norm_topk_prob)
        return logits_TE, weight_TK.to(x_TD.dtype), index_TK + organ_T[:, None] * logits_TE.shape[1]


class ByOrganObjective(TrainingObjective):
    """The usual loss; before each forward pass the gates learn which organ each token belongs to."""

    def forward(
        self,
        input_ids: torch.Tensor,
        sequence_lengths: torch.Tensor,
        targets: torch.Tensor,
        target_weights: torch.Tensor,
        *args: Any,
        **inputs: Any,
    ) -> dict[str, torch.Tensor]:
        """See `TrainingObjective.forward`; `finding_organs` numbers the organ of each example."""
        set_organs(self.model, inputs["finding_organs"].repeat_interleave(sequence_lengths))
        return super().forward(input_ids, sequence_lengths, targets, target_weights, *args, **inputs)


@dataclass(frozen=True, slots=True)
class _Zeros:
    output_TD: torch.Tensor

    def result(self) -> torch.Tensor:
        return self.output_TD


class _NoExperts(nn.Module):
    """In the place of a layer's mixture of experts: adds nothing.

    Its gate has one frozen expert, so that the load-balancing loss is a constant.
    """

    def __init__(self, config: EchoVLMTextConfig) -> None:
        super().__init__()
        self.gate = EchoVLMTokenGate(config)
        nn.init.zeros_(self.gate.weight)

    def begin(self, layer: int, x_TD: torch.Tensor) -> _Zeros:
        self.gate(x_TD)
        return _Zeros(torch.zeros_like(x_TD))

    def shared(self, x_TD: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x_TD)


class _DenseAlone(nn.Module):
    """In the place of a layer's `coefficient`: nothing for the mixture, all for the dense MLP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_tensor([-torch.inf, 0.0]).expand(*x.shape[:-1], 2)


class _Nothing(nn.Module):
    """In the place of a shared expert or of its gate: zeros.

    Attributes:
        width: of the output; None: as the input.
    """

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self._width = width

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD.new_zeros(len(x_TD), self._width or x_TD.shape[1])


def build(
    variant: Variant, start: Path, tower: Path, *, organs: int, layers: int, seed: int
) -> EchoVLMForConditionalGeneration:
    """A variant with random weights, the given vision tower, and everything but the tower ready to learn.

    Args:
        variant: which one.
        start: the folder with the configuration, see `echovlm_ray.training.small_start`.
        tower: the checkpoint of the frozen vision tower.
        organs: how many organs there are.
        layers: of the language model.
        seed: of the random weights.
    """
    sizes: dict[str, Any] = _sizes(variant, start, organs) | {"num_hidden_layers": layers}
    config: EchoVLMConfig = EchoVLMConfig.from_pretrained(start, **sizes)
    torch.manual_seed(seed)
    model: EchoVLMForConditionalGeneration = EchoVLMForConditionalGeneration._from_config(config, dtype=torch.float32)
    assert model.model.visual is not None
    model.model.visual.load_state_dict(load_vision_tower(tower, dtype=torch.float32).state_dict())
    model.model.visual.requires_grad_(False)
    change = _change(variant, config.text_config, organs)
    for layer in model.model.language_model.layers:
        assert isinstance(layer, EchoVLMDecoderLayer)
        change(layer)
    return model


def _sizes(variant: Variant, start: Path, organs: int) -> dict[str, int]:
    plain = EchoVLMConfig.from_pretrained(start).text_config
    if variant.as_large:
        return {"num_experts": 1, "num_experts_per_tok": 1, "intermediate_size": _as_large(plain)}
    experts = variant.experts * organs if variant.groups else max(variant.experts, 1)
    return {"num_experts": experts, "num_experts_per_tok": min(variant.top_k, experts)}


def _as_large(config: EchoVLMTextConfig) -> int:
    """The inner size of a dense MLP that has the parameters of the MoE beside it, as nearly as possible."""
    hidden = config.hidden_size
    inner = config.num_experts * config.moe_intermediate_size + config.shared_expert_intermediate_size
    gates = (config.num_experts + 1) * hidden + 2 * hidden + 2
    return config.intermediate_size + inner + round(gates / (3 * hidden))


def _change(variant: Variant, config: EchoVLMTextConfig, organs: int) -> Callable[[EchoVLMDecoderLayer], None]:
    def change(layer: EchoVLMDecoderLayer) -> None:
        if not variant.experts:
            moe = _NoExperts(config)
            moe.requires_grad_(False)
            layer.moe = moe  # type: ignore[assignment]
            layer.coefficient = _DenseAlone()  # type: ignore[assignment]
            return
        if not variant.shared:
            layer.moe.shared_expert = _Nothing()  # type: ignore[assignment]
            layer.moe.shared_expert_gate = _Nothing(1)  # type: ignore[assignment]
        if variant.by_organ:
            gate = OrganGate(config, organs)
            with torch.no_grad():
                gate.weight.copy_(layer.moe.gate.weight)
            layer.moe.gate = gate

    return change


def objective_of(variant: Variant, model: EchoVLMForConditionalGeneration, *, balancing: float) -> TrainingObjective:
    """What a variant is trained with."""
    kind = ByOrganObjective if variant.by_organ else TrainingObjective
    return kind(model, balancing=balancing)


def set_organs(model: EchoVLMForConditionalGeneration, organ_T: torch.Tensor) -> None:
    """Says which organ each token of the next forward passes belongs to; see `OrganGate.organ_T`."""
    for module in model.modules():
        if isinstance(module, OrganGate):
            module.organ_T = organ_T


def size_of(variant: Variant, model: EchoVLMForConditionalGeneration) -> Size:
    """How many parameters there are, and how many of them a token meets."""
    assert model.model.visual is not None
    vision = {id(value) for value in model.model.visual.parameters()}
    total = sum(value.numel() for value in model.parameters() if value.requires_grad or id(value) in vision)
    if not variant.experts:
        return Size(total, total)
    config = model.config.text_config
    routed = sum(value.numel() for name, value in model.named_parameters() if ".moe.experts." in name)
    return Size(total, total - routed * (config.num_experts - config.num_experts_per_tok) // config.num_experts)
