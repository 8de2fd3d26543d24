"""Orders pairs of tokens and experts as the GPU kernels group and sum them. Does not synchronise with the device."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class OrderedPairs:
    """All pairs of a call, ordered by expert within each token, which is the order of the sums over k.

    Pairs without an expert come last in their token, with the expert number E and the weight 0.
    """

    expert_TK: torch.Tensor
    weight_TK: torch.Tensor


def order_pairs(expert_index_TK: torch.Tensor, weight_TK: torch.Tensor, num_experts: int) -> OrderedPairs:
    """Orders the pairs of each token by expert; those that name the same expert twice keep their order.

    Args:
        expert_index_TK: from 0; negative where the pair has no expert here.
        weight_TK: any value, even a NaN, where the pair has no expert.
        num_experts: E.

    Returns:
        the experts as int32 and the weights in their dtype, both contiguous.
    """
    nobody_TK = expert_index_TK < 0
    expert_TK, place_TK = torch.sort(expert_index_TK.masked_fill(nobody_TK, num_experts), dim=1, stable=True)
    weight_TK = weight_TK.masked_fill(nobody_TK, 0).gather(1, place_TK)
    return OrderedPairs(expert_TK.int().contiguous(), weight_TK.contiguous())


def sum_over_k(part_TKD: torch.Tensor) -> torch.Tensor:
    """Sums the ordered parts of each token in float32, one after the other, and rounds once to the parts' dtype."""
    sum_TD = part_TKD[:, 0].float()
    for k in range(1, part_TKD.shape[1]):
        sum_TD = sum_TD + part_TKD[:, k]
    return sum_TD.to(part_TKD.dtype)
