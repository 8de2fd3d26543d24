"""The token gate: chooses the experts of each token and their weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from experts.kernels.packed_linear import PackedLinear, packing_available

_PADDED_EXPERTS = 16


@dataclass(frozen=True, slots=True)
class TokenRouting:
    """The gate's choices for T tokens over E experts, K of them per token."""

    # In x's dtype, before the softmax; used by the load-balancing loss and the golden cases.
    logits_TE: torch.Tensor
    # In x's dtype.
    weight_TK: torch.Tensor
    # int64, in descending order of weight.
    index_TK: torch.Tensor


def route_tokens(x_TD: torch.Tensor, gate_ED: torch.Tensor, top_k: int, norm_topk_prob: bool) -> TokenRouting:
    """Softmax over all experts in float32, then the top k.

    The weights are renormalised only with `norm_topk_prob`: the paper (arXiv 2509.14977) always renormalises, but the
    code of the released weights does not.

    Args:
        x_TD: tokens × hidden, after the post-attention norm.
        gate_ED: experts × hidden, one row per expert.
        top_k: experts per token.
        norm_topk_prob: whether the weights of the chosen experts are scaled to add up to 1.

    Returns:
        logits, weights and indices.
    """
    logits_TE = F.linear(x_TD, gate_ED)
    weight_TK, index_TK = choose_experts(logits_TE, top_k, norm_topk_prob)
    return TokenRouting(logits_TE, weight_TK, index_TK)


class GateProduct:
    """One layer's gate over the experts of one or several organs, for inference.

    On a CPU the logit of a token and an expert is batch-invariant: it has the same bits for any other tokens and
    experts in the product. `torch.nn.functional.linear` does not guarantee that, because its order of summation depends
    on the numbers of rows and columns. Then the weights, and sometimes the generated tokens, would depend on the other
    requests in the batch.
    """

    __slots__ = ("_num_experts", "_product")

    def __init__(self, gate_ED: torch.Tensor) -> None:
        """`gate_ED` has the gate rows: experts × hidden."""
        self._num_experts = len(gate_ED)
        self._product: Callable[[torch.Tensor], torch.Tensor] = partial(F.linear, weight=gate_ED)
        if gate_ED.device.type == "cpu" and packing_available(gate_ED.dtype):
            # Padded with rows of zeros, because oneDNN sums a single expert in another order. oneDNN would pad to as
            # many.
            padding = -self._num_experts % _PADDED_EXPERTS
            self._product = PackedLinear(F.pad(gate_ED, (0, 0, 0, padding)))

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Maps tokens × hidden to tokens × experts, in the same dtype."""
        return self._product(x_TD)[:, : self._num_experts]

    def warm_up(self) -> None:
        """Compiles the product for every number of rows that a step may have, once for all gates of this size."""
        if isinstance(self._product, PackedLinear):
            self._product.warm_up()


def choose_experts(logits_TE: torch.Tensor, top_k: int, norm_topk_prob: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of `route_tokens` after the logits. Returns the weights in their dtype, and the indices as int64."""
    probability_TE = F.softmax(logits_TE, dim=-1, dtype=torch.float32)
    weight_TK, index_TK = torch.topk(probability_TE, top_k, dim=-1)
    if norm_topk_prob:
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
    return weight_TK.to(logits_TE.dtype), index_TK
