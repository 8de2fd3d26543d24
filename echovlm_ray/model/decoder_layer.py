"""One decoder layer of EchoVLM: attention, then the dense MLP and the mixture of experts side by side."""

# transformers leaves most of its methods untyped.
# mypy: disable-error-code="no-untyped-call"

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2MLP,
    Qwen2VLAttention,
    Qwen2VLDecoderLayer,
    Qwen2VLRMSNorm,
)

from echovlm_ray.model.configuration import EchoVLMTextConfig
from echovlm_ray.model.experts import EchoVLMSparseMoe
from router.dispatch.routed_experts import PendingExperts, RoutedExperts


class DenseOutput(Protocol):
    """The output of a layer's dense path: the dense MLP and the shared expert, with the mixing coefficients."""

    def mix(self, hidden_states: torch.Tensor, routed_TD: torch.Tensor) -> torch.Tensor:
        """Adds the dense path and the routed experts to the residual.

        Args:
            hidden_states: … × hidden: the residual.
            routed_TD: tokens × hidden: the output of the routed experts.

        Returns:
            … × hidden.
        """
        ...


@dataclass(frozen=True, slots=True)
class DenseTensors:
    """A `DenseOutput` of separate tensors.

    Attributes:
        dense: … × hidden, of the dense MLP.
        shared_TD: tokens × hidden, of the shared expert behind its gate.
        coefficient: … × 2, before the softmax.
    """

    dense: torch.Tensor
    shared_TD: torch.Tensor
    coefficient: torch.Tensor

    def mix(self, hidden_states: torch.Tensor, routed_TD: torch.Tensor) -> torch.Tensor:
        share = F.softmax(self.coefficient, dim=-1)
        mixture = (routed_TD + self.shared_TD).view_as(self.dense)
        return hidden_states + (share[..., :1] * mixture + share[..., 1:] * self.dense)


class EchoVLMDecoderLayer(Qwen2VLDecoderLayer):
    """Attention, then dense MLP and mixture of experts side by side, mixed by two coefficients per token.

    Attributes:
        attention_override: for inference only: replaces attention and both norms. From batch × tokens × hidden and
            the arguments of Qwen2-VL's attention to the residual sum and its norm.
        dense_path_override: for inference only: replaces dense MLP, shared expert and coefficients. From
            … × hidden to `DenseOutput`.
    """

    def __init__(self, config: EchoVLMTextConfig, layer_idx: int, *, routed_experts: bool = True) -> None:
        GradientCheckpointingLayer.__init__(self)
        self.layer_idx = layer_idx
        self.hidden_size = config.hidden_size
        self.self_attn = Qwen2VLAttention(config, layer_idx)
        self.mlp = Qwen2MLP(config)
        self.moe = EchoVLMSparseMoe(config, routed_experts=routed_experts)
        self.coefficient = nn.Linear(config.hidden_size, 2)
        self.attention_override: nn.Module | None = None
        self.dense_path_override: nn.Module | None = None
        self.input_layernorm = Qwen2VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, *, routed_experts: RoutedExperts | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """One layer: `begin`, then `finish`.

        Args:
            hidden_states: batch × tokens × hidden.
            routed_experts: computes the routed experts; None for the layer's own.
            kwargs: arguments of Qwen2-VL's attention.

        Returns:
            batch × tokens × hidden.
        """
        return self.finish(self.begin(hidden_states, routed_experts=routed_experts, **kwargs))

    def begin(
        self, hidden_states: torch.Tensor, *, routed_experts: RoutedExperts | None = None, **kwargs: Any
    ) -> "PendingLayer":
        """Computes attention and starts the routed experts, which may run concurrently until `finish`."""
        hidden_states, x = (self.attention_override or self._attention)(hidden_states, **kwargs)
        routed = (routed_experts or self.moe).begin(self.layer_idx, x.reshape(-1, self.hidden_size))
        return PendingLayer(hidden_states, x, routed)

    def finish(self, pending_layer: "PendingLayer") -> torch.Tensor:
        """Computes the dense path, waits for the routed experts, and mixes both. Returns as `forward`."""
        dense: DenseOutput = (self.dense_path_override or self._dense_path)(pending_layer.x)
        return dense.mix(pending_layer.hidden_states, pending_layer.routed.result())

    def _attention(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states, self.post_attention_layernorm(hidden_states)

    def _dense_path(self, x: torch.Tensor) -> DenseTensors:
        return DenseTensors(self.mlp(x), self.moe.shared(x.reshape(-1, self.hidden_size)), self.coefficient(x))


@dataclass(frozen=True, slots=True)
class PendingLayer:
    """A layer between `begin` and `finish`.

    Attributes:
        hidden_states: batch × tokens × hidden, after the attention's residual sum.
        x: the same, after the post-attention norm.
        routed: its routed experts.
    """

    hidden_states: torch.Tensor
    x: torch.Tensor
    routed: PendingExperts
