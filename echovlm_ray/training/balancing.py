"""The load-balancing loss of a training step, and its statistics: load, entropy and dead experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

# An expert with less than this fraction of an even share counts as dead.
DEAD_SHARE = 0.01


def sequence_balancing_loss(
    router_logits: Sequence[torch.Tensor], top_k: int, sequence_lengths_B: torch.Tensor
) -> torch.Tensor:
    """`E · Σ_e f_e · p_e` of the Switch Transformer (arXiv 2101.03961), for each layer and sequence separately.

    Of whole batches it would not be a sum over examples: four batches of one would have other gradients than one of
    four, and two workers others than one. For each sequence (as in DeepSeek-V3, arXiv 2412.19437, section 2.1.2) it is.

    Args:
        router_logits: per layer tokens × experts, before the softmax; the sequences' tokens one after the other, and no
            padding.
        top_k: how many experts a token gets.
        sequence_lengths_B: how many tokens each sequence has, int64.

    Returns:
        The sum over sequences of the mean over layers: a scalar in float32, `top_k` a sequence when tokens are spread
        evenly, with gradients through p.
    """
    probability_LTE = F.softmax(torch.stack([logits.float() for logits in router_logits]), dim=-1)
    layers, _, num_experts = probability_LTE.shape
    sequence_T = torch.repeat_interleave(sequence_lengths_B)
    sums = torch.zeros(layers, len(sequence_lengths_B), num_experts, device=probability_LTE.device)
    chosen_LBE = sums.index_add(1, sequence_T, _chosen(probability_LTE, top_k)) / sequence_lengths_B[:, None]
    mean_LBE = sums.index_add(1, sequence_T, probability_LTE) / sequence_lengths_B[:, None]
    return num_experts * (chosen_LBE * mean_LBE).sum(dim=-1).mean(dim=0).sum()


def _chosen(probability: torch.Tensor, top_k: int) -> torch.Tensor:
    index = probability.topk(top_k, dim=-1).indices
    return torch.zeros_like(probability).scatter_(-1, index, 1.0)


@dataclass(slots=True, eq=False)
class RoutingCounts:
    """What the gates did since the last look.

    Attributes:
        chosen_LE: how many tokens chose each expert, by layer.
        entropy_L: the sum over tokens of the entropy of their gate, in nats.
        tokens: how many there were.
    """

    chosen_LE: torch.Tensor | None = None
    entropy_L: torch.Tensor | None = None
    tokens: int = 0

    @torch.no_grad()
    def add(self, router_logits: Sequence[torch.Tensor], top_k: int) -> None:
        """Counts one forward pass, which has no padding."""
        logits_LNE = torch.stack([logits.detach().float() for logits in router_logits])
        log_LNE = F.log_softmax(logits_LNE, dim=-1)
        entropy_L = -(log_LNE.exp() * log_LNE).sum(dim=(1, 2))
        chosen_LE = _chosen(log_LNE, top_k).sum(dim=1)
        self.chosen_LE = chosen_LE if self.chosen_LE is None else self.chosen_LE + chosen_LE
        self.entropy_L = entropy_L if self.entropy_L is None else self.entropy_L + entropy_L
        self.tokens += logits_LNE.shape[1]

    def take(self, total: Callable[[Any], Any] = lambda value: value) -> dict[str, float]:
        """Returns the numbers for the log, and resets the counts.

        Args:
            total: adds up a number or a tensor over all workers.

        Returns:
            by layer each expert's share of the choices and the mean entropy as a share of the largest possible; over
            all layers how many experts are dead.
        """
        if self.chosen_LE is None or self.entropy_L is None or not self.tokens:
            return {}
        chosen_LE, entropy_L, tokens = total(self.chosen_LE), total(self.entropy_L), total(self.tokens)
        share_LE = chosen_LE / chosen_LE.sum(dim=1, keepdim=True)
        num_experts = share_LE.shape[1]
        largest = float(torch.log(torch.tensor(float(num_experts)))) or 1.0
        numbers = {
            f"load/layer_{layer}/expert_{expert}": float(share_LE[layer, expert])
            for layer in range(len(share_LE))
            for expert in range(num_experts)
        }
        numbers |= {
            f"gate_entropy/layer_{layer}": float(entropy) / tokens / largest for layer, entropy in enumerate(entropy_L)
        }
        numbers["dead_experts"] = float((share_LE < DEAD_SHARE / num_experts).sum())
        self.chosen_LE = self.entropy_L = None
        self.tokens = 0
        return numbers
