"""The mixture of experts of one decoder layer: token gate, routed experts, shared expert.

The routed experts of a layer may be computed outside of the model. Then the layer has neither gate nor experts, and its
caller passes a `router.dispatch.routed_experts.RoutedExperts`. `EchoVLMSparseMoe` implements the same interface with
its own experts.
"""

# transformers leaves most of its methods untyped.
# mypy: disable-error-code="no-untyped-call"

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP

from echovlm_ray.model.configuration import EchoVLMTextConfig
from echovlm_ray.model.expert_kernels import register_expert_kernels, weights_of
from experts.kernels.registry import get_kernel
from router.gating.token_gate import route_tokens


class EchoVLMTokenGate(nn.Module):
    """One layer's gate: `router.gating.token_gate.route_tokens` with trainable rows."""

    def __init__(self, config: EchoVLMTextConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns logits tokens × experts, weights and indices tokens × top_k.

        Under autocast the gate is computed in float32: in bfloat16 the choice between experts with close logits would
        depend on rounding.
        """
        if not torch.is_autocast_enabled(x_TD.device.type):
            routing = route_tokens(x_TD, self.weight, self.top_k, self.norm_topk_prob)
            return routing.logits_TE, routing.weight_TK, routing.index_TK
        with torch.autocast(x_TD.device.type, enabled=False):
            routing = route_tokens(x_TD.float(), self.weight.float(), self.top_k, self.norm_topk_prob)
        return routing.logits_TE, routing.weight_TK.to(x_TD.dtype), routing.index_TK


@use_experts_implementation
class EchoVLMExperts(nn.Module):
    """One layer's routed experts, stacked as in transformers' experts interface.

    `config._experts_implementation` selects the implementation: a kernel by its name, or a function of transformers.
    "eager", the default, is the kernel `reference`, which supports gradients. So a plain model and an expert group
    compute the same with the same code.
    """

    def __init__(self, config: EchoVLMTextConfig) -> None:
        super().__init__()
        # transformers' experts functions read num_experts and act_fn.
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(
            torch.empty(config.num_experts, 2 * config.moe_intermediate_size, config.hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.moe_intermediate_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum over each token's experts, added up in float32 in the order of the experts.

        Args:
            hidden_states: tokens × hidden.
            top_k_index: tokens × top_k, int64.
            top_k_weights: tokens × top_k, in the dtype of hidden_states.

        Returns:
            tokens × hidden, in the dtype of hidden_states.
        """
        return get_kernel("reference").load(weights_of(self)).forward(hidden_states, top_k_index, top_k_weights)


@dataclass(frozen=True, slots=True)
class _ComputedExperts:
    output_TD: torch.Tensor

    def result(self) -> torch.Tensor:
        return self.output_TD


class EchoVLMSparseMoe(nn.Module):
    """Gate, routed experts and shared expert of one layer.

    Constructor arguments: the text configuration; whether the layer has its own routed experts.
    """

    def __init__(self, config: EchoVLMTextConfig, *, routed_experts: bool = True) -> None:
        super().__init__()
        if routed_experts:
            self.gate = EchoVLMTokenGate(config)
            self.experts = EchoVLMExperts(config)
        self.has_routed_experts = routed_experts
        self.shared_expert = Qwen2MoeMLP(config, intermediate_size=config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def begin(self, layer: int, x_TD: torch.Tensor) -> _ComputedExperts:
        """Computes this layer's experts synchronously: the in-process `RoutedExperts`.

        Raises:
            ValueError: the model was loaded without experts.
        """
        if not self.has_routed_experts:
            raise ValueError(
                f"layer {layer} has no experts of its own (the model was loaded as a backbone): pass routed_experts"
            )
        _, weight_TK, index_TK = self.gate(x_TD)
        return _ComputedExperts(self.experts(x_TD, index_TK, weight_TK))

    def shared(self, x_TD: torch.Tensor) -> torch.Tensor:
        """`sigmoid(x · shared_expert_gateᵀ) · SwiGLU_shared(x)`: tokens × hidden."""
        output_TD: torch.Tensor = F.sigmoid(self.shared_expert_gate(x_TD)) * self.shared_expert(x_TD)
        return output_TD


register_expert_kernels()
