"""MegaBlocks' dropless experts as grouped matrix products of the package grouped_gemm: nothing is padded."""

import importlib
from typing import Any

import torch
import torch.nn.functional as F

from experts.kernels.base import ExpertWeights
from experts.kernels.gpu_support import check_weights, import_megablocks, on_device, refuse_gradients
from experts.kernels.grouping import order_pairs, sum_over_k

_NAME = "megablocks_grouped"


class MegaBlocksGroupedExperts:
    """One layer's experts, stacked. No gradients."""

    def __init__(self, weights: ExpertWeights, megablocks: Any, grouped_gemm: Any) -> None:
        """Uses the weights; copies those that are not contiguous."""
        self._megablocks, self._grouped_gemm = megablocks, grouped_gemm
        self._gate_EFD = weights.gate_EFD.detach().contiguous()
        self._up_EFD = weights.up_EFD.detach().contiguous()
        self._down_EDF = weights.down_EDF.detach().contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self._gate_EFD.nbytes + self._up_EFD.nbytes + self._down_EDF.nbytes

    def forward(self, x_TD: torch.Tensor, expert_index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """The weighted sum over each token's experts; see `experts.kernels.base.PreparedExperts`.

        Synchronises with the device, because grouped_gemm needs the sizes of the groups on the host.
        """
        refuse_gradients(_NAME, x_TD, weight_TK)
        tokens, top_k = expert_index_TK.shape
        if tokens == 0 or top_k == 0:
            return torch.zeros_like(x_TD)
        with on_device(x_TD):
            return self._exchange(x_TD, expert_index_TK, weight_TK)

    def _exchange(self, x_TD: torch.Tensor, expert_index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        ops, num_experts = self._megablocks, self._gate_EFD.shape[0]
        pairs = order_pairs(expert_index_TK, weight_TK, num_experts)
        expert_P = pairs.expert_TK.flatten()
        top_k = pairs.expert_TK.shape[1]
        # One bin more, the last, for the pairs without an expert.
        bin_P, pair_P = ops.sort(expert_P, (num_experts + 1).bit_length())
        count_B = ops.histogram(expert_P, num_experts + 1)
        end_B = ops.inclusive_cumsum(count_B, 0)
        size_E = count_B[:num_experts].cpu().long()
        expert_rows = int(size_E.sum())
        if expert_rows == 0:
            return torch.zeros_like(x_TD)
        x_PD = ops.gather(x_TD.contiguous(), pair_P, bin_P, end_B, top_k)
        output_PD = torch.zeros_like(x_PD)
        output_PD[:expert_rows] = self._experts(x_PD[:expert_rows], size_E)
        part_PD = ops.scatter(output_PD, pair_P, bin_P, pairs.weight_TK.flatten(), end_B, 1)
        return sum_over_k(part_PD.view(x_TD.shape[0], top_k, -1))

    def _experts(self, x_RD: torch.Tensor, size_E: torch.Tensor) -> torch.Tensor:
        gmm = self._grouped_gemm.ops.gmm
        gate_RF = gmm(x_RD, self._gate_EFD, size_E, trans_b=True)
        up_RF = gmm(x_RD, self._up_EFD, size_E, trans_b=True)
        output_RD: torch.Tensor = gmm(F.silu(gate_RF).mul_(up_RF), self._down_EDF, size_E, trans_b=True)
        return output_RD


class MegaBlocksGroupedKernel:
    """MegaBlocks' routing and the grouped matrix products of grouped_gemm, which are in bfloat16 only."""

    def __init__(self) -> None:
        """Imports the libraries.

        Raises:
            ImportError: megablocks, stanford-stk, triton or grouped_gemm is not installed.
        """
        self._grouped_gemm = importlib.import_module("grouped_gemm")
        self._megablocks, _ = import_megablocks()

    @property
    def name(self) -> str:
        """The name in configuration and status."""
        return _NAME

    def load(self, weights: ExpertWeights) -> MegaBlocksGroupedExperts:
        """Takes the weights as they are.

        Raises:
            ValueError: the weights are not on a GPU, or of another dtype.
        """
        check_weights(_NAME, weights, (torch.bfloat16,))
        return MegaBlocksGroupedExperts(weights, self._megablocks, self._grouped_gemm)
