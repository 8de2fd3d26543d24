"""Splits the choices of one gate over all experts by organ."""

from collections.abc import Sequence

import torch

from experts.kernels.base import NO_EXPERT
from router.gating.token_gate import TokenRouting


class FlatSplit:
    """The ranges of the organs' experts in a flat set."""

    def __init__(self, ranges: Sequence[tuple[int, int]], device: torch.device) -> None:
        """`ranges` has the range [start, end) of every organ's experts, in the set's order."""
        self.num_organs = len(ranges)
        self._first_O = torch.tensor([start for start, _ in ranges], device=device)
        organs = torch.arange(self.num_organs)
        sizes = torch.tensor([end - start for start, end in ranges])
        self._organ_E = torch.repeat_interleave(organs, sizes).to(device)

    def organ_of(self, routing: TokenRouting) -> torch.Tensor:
        """The organ of every pair, as its index in the set: tokens × top_k, int64."""
        return self._organ_E[routing.index_TK]

    def split(
        self, routing: TokenRouting, organ_TK: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The rows, experts and weights of every organ. The number of operations does not depend on the number of
        organs.

        Args:
            routing: the gate's choices.
            organ_TK: from `organ_of`.

        Returns:
            for every organ: the tokens with one of its experts, in ascending order; for each of them the experts,
            counted from the organ's first one, and `NO_EXPERT` for pairs of other organs; and the weights.
        """
        tokens = organ_TK.shape[0]
        hit_OT = torch.zeros(tokens, self.num_organs, dtype=torch.bool, device=organ_TK.device)
        hit_OT = hit_OT.scatter_(1, organ_TK, True).T
        organ_N, token_N = hit_OT.nonzero(as_tuple=True)
        own_NK = organ_TK[token_N] == organ_N[:, None]
        index_NK = torch.where(own_NK, routing.index_TK[token_N] - self._first_O[organ_N][:, None], NO_EXPERT)
        weight_NK = routing.weight_TK[token_N]
        counts = hit_OT.sum(1).tolist()
        return list(zip(*(each.split(counts) for each in (token_N, index_NK, weight_NK)), strict=True))
