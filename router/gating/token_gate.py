"""The token gate: which experts a token goes to, with what weight."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from experts.kernels.packed_linear import PackedLinear, packing_available

_PADDED_EXPERTS = 16


@dataclass(frozen=True, slots=True)
class TokenRouting:
    """What the gate decided for T tokens over E experts, K of them chosen per token."""

    # In x's dtype, before the softmax; the load-balancing loss and the golden cases look at them.
    logits_TE: torch.Tensor
    # In x's dtype.
    weight_TK: torch.Tensor
    # int64, in descending order of weight.
    index_TK: torch.Tensor


def route_tokens(x_TD: torch.Tensor, gate_ED: torch.Tensor, top_k: int, norm_topk_prob: bool) -> TokenRouting:
    """Softmax over all experts in float32, then the k most likely of them.

    The weights are renormalised only with `norm_topk_prob`: the paper (arXiv 2509.14977) always does, but the code
    that made the released weights does not.

    Args:
        x_TD: tokens × hidden, after the post-attention norm.
        gate_ED: experts × hidden, one row per expert.
        top_k: how many experts a token gets.
        norm_topk_prob: whether the chosen weights are scaled to add up to 1.

    Returns:
        logits, weights and indices.
    """
    logits_TE = F.linear(x_TD, gate_ED)
    weight_TK, index_TK = choose_experts(logits_TE, top_k, norm_topk_prob)
    return TokenRouting(logits_TE, weight_TK, index_TK)


class GateProduct:
    """One layer's gate over the experts of one or several organs, for inference.

    On a CPU the logits of a token and an expert have the same bits whatever other tokens and experts are computed with
    them. `torch.nn.functional.linear` promises no such thing: it sums a lone row, or other numbers of rows and columns,
    in another order. Then the weight of an expert would depend on who else asks, and now and then so would a token.
    """

    __slots__ = ("_num_experts", "_product")

    def __init__(self, gate_ED: torch.Tensor) -> None:
        """Takes the rows: experts × hidden."""
        self._num_experts = len(gate_ED)
        self._product: Callable[[torch.Tensor], torch.Tensor] = partial(F.linear, weight=gate_ED)
        if gate_ED.device.type == "cpu" and packing_available(gate_ED.dtype):
            # Rows of zeros, for oneDNN sums a lone expert in another order. It would add as many by itself.
            padding = -self._num_experts % _PADDED_EXPERTS
            self._product = PackedLinear(F.pad(gate_ED, (0, 0, 0, padding)))

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Tokens × hidden to tokens × experts, in the same dtype."""
        return self._product(x_TD)[:, : self._num_experts]

    def warm_up(self) -> None:
        """Has the code for every number of rows compiled that a step may have, once for all gates of this size."""
        if isinstance(self._product, PackedLinear):
            self._product.warm_up()


def choose_experts(logits_TE: torch.Tensor, top_k: int, norm_topk_prob: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What `route_tokens` does once the logits are there: weights in their dtype, and indices as int64."""
    probability_TE = F.softmax(logits_TE, dim=-1, dtype=torch.float32)
    weight_TK, index_TK = torch.topk(probability_TE, top_k, dim=-1)
    if norm_topk_prob:
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
    return weight_TK.to(logits_TE.dtype), index_TK
