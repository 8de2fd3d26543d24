"""The reference kernel, a loop over experts: slow, simple, and the standard for all other kernels."""

import torch
import torch.nn.functional as F

from experts.kernels.base import ExpertWeights


class ReferenceExperts:
    """One layer's experts, unchanged. Differentiable."""

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

    Deterministic. In float32 a token's result may depend on the number of tokens in the call, as with
    `torch.nn.functional.linear`.
    """

    @property
    def name(self) -> str:
        """The name in configuration and status."""
        return "reference"

    def load(self, weights: ExpertWeights) -> ReferenceExperts:
        """Uses the weights unchanged."""
        return ReferenceExperts(weights)
