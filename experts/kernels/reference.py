"""The loop over experts: slow, plain, and what every other kernel is compared with."""

import torch
import torch.nn.functional as F

from experts.kernels.base import ExpertWeights


class ReferenceExperts:
    """One layer's experts as they were loaded. Differentiable."""

    def __init__(self, weights: ExpertWeights) -> None:
        self._weights = weights

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self._weights.nbytes

    def forward(self, x_TD: torch.Tensor, expert_index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """The weighted sum over each token's experts; see `experts.kernels.base.PreparedExperts`."""
        weights = self._weights
        sum_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        for expert in range(weights.num_experts):
            token_N, pair_N = torch.where(expert_index_TK == expert)
            if token_N.numel() == 0:
                continue
            x_ND = x_TD[token_N]
            inner_NF = F.silu(F.linear(x_ND, weights.gate_EFD[expert])) * F.linear(x_ND, weights.up_EFD[expert])
            output_ND = F.linear(inner_NF, weights.down_EDF[expert])
            # The product is rounded to the weights' dtype, as in the released code; only the sum is taken in float32.
            sum_TD.index_add_(0, token_N, (output_ND * weight_TK[token_N, pair_N, None]).float())
        return sum_TD.to(x_TD.dtype)


class ReferenceKernel:
    """Loops over the experts in the weights' dtype; sums in float32, in the order of the experts.

    Equal calls give equal bits. In float32 a token's result may depend on how many others are in the call, as that of
    `torch.nn.functional.linear` does.
    """

    @property
    def name(self) -> str:
        """The name by which configuration and status know it."""
        return "reference"

    def load(self, weights: ExpertWeights) -> ReferenceExperts:
        """Takes the weights as they are."""
        return ReferenceExperts(weights)
