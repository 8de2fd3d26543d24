"""The kernel for training: all experts in three grouped matrix products of torch, with gradients, on CPU and GPU."""

import torch
import torch.nn.functional as F

from experts.kernels.base import ExpertWeights

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The alignment of rows that the grouped product needs.
_ROW_BYTES = 16


class GroupedExperts:
    """One layer's experts, stacked. Differentiable in weights, rows and pair weights."""

    def __init__(self, weights: ExpertWeights) -> None:
        """Uses the weights; copies them only if rows must be padded."""
        multiple = _ROW_BYTES // weights.dtype.itemsize
        self._num_experts = weights.num_experts
        self._hidden_size = weights.hidden_size
        self._hidden_pad = -weights.hidden_size % multiple
        inner_pad = -weights.intermediate_size % multiple
        # Zeros in the padding add nothing: silu(0) · 0 = 0.
        self._gate_EFD = _pad(weights.gate_EFD, inner_pad, self._hidden_pad)
        self._up_EFD = _pad(weights.up_EFD, inner_pad, self._hidden_pad)
        self._down_EDF = _pad(weights.down_EDF, self._hidden_pad, inner_pad)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, with their padding."""
        return self._gate_EFD.nbytes + self._up_EFD.nbytes + self._down_EDF.nbytes

    def forward(self, x_TD: torch.Tensor, expert_index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """The weighted sum over each token's experts; see `experts.kernels.base.PreparedExperts`.

        Does not synchronise with the device: empty experts and pairs without an expert stay in the call, as rows beyond
        the last offset and as zeros in the sum.
        """
        tokens, top_k = expert_index_TK.shape
        if tokens == 0 or top_k == 0:
            return torch.zeros_like(x_TD)
        # Per token in the order of the experts, so that the sum below is; those without an expert last.
        expert_TK = torch.where(expert_index_TK < 0, self._num_experts, expert_index_TK).long()
        expert_TK, place_TK = torch.sort(expert_TK, dim=1, stable=True)
        nobody_TK = expert_TK == self._num_experts
        # Filled, because the grouped product leaves such rows and their gradients undefined.
        weight_TK = weight_TK.gather(1, place_TK).masked_fill(nobody_TK, 0)
        expert_P = expert_TK.flatten()
        order_P = torch.argsort(expert_P, stable=True)
        counts_E = torch.zeros(self._num_experts + 1, dtype=torch.int32, device=x_TD.device)
        counts_E.index_add_(0, expert_P, torch.ones_like(expert_P, dtype=torch.int32))
        end_E = counts_E.cumsum(0, dtype=torch.int32)[: self._num_experts]
        x_PD = F.pad(x_TD, (0, self._hidden_pad))[order_P // top_k]
        output_PD = self._experts(x_PD.masked_fill(nobody_TK.flatten()[order_P, None], 0), end_E)
        row_TK = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(tokens * top_k, device=x_TD.device))
        row_TK = row_TK.view(tokens, top_k)
        sum_TD = torch.zeros((tokens, self._hidden_size), dtype=torch.float32, device=x_TD.device)
        for k in range(top_k):
            part_TD = output_PD[row_TK[:, k], : self._hidden_size] * weight_TK[:, k, None]
            sum_TD = sum_TD + part_TD.masked_fill(nobody_TK[:, k, None], 0).float()
        return sum_TD.to(x_TD.dtype)

    def _experts(self, x_PD: torch.Tensor, end_E: torch.Tensor) -> torch.Tensor:
        gate_PF = F.grouped_mm(x_PD, self._gate_EFD.transpose(1, 2), offs=end_E)
        up_PF = F.grouped_mm(x_PD, self._up_EFD.transpose(1, 2), offs=end_E)
        return F.grouped_mm(F.silu(gate_PF) * up_PF, self._down_EDF.transpose(1, 2), offs=end_E)


def _pad(matrix_ERC: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return F.pad(matrix_ERC, (0, columns, 0, rows)) if rows or columns else matrix_ERC


class TorchGroupedKernel:
    """Computes with `torch.nn.functional.grouped_mm`: differentiable, on any device that it supports."""

    @property
    def name(self) -> str:
        """The name in configuration and status."""
        return "torch_grouped"

    def load(self, weights: ExpertWeights) -> GroupedExperts:
        """Takes the weights as they are, padded where their rows are not multiples of 16 bytes.

        Raises:
            ValueError: a dtype that the grouped product does not take.
        """
        if weights.dtype not in _DTYPES:
            known = ", ".join(str(dtype) for dtype in _DTYPES)
            raise ValueError(f"the expert kernel torch_grouped takes {known}, not {weights.dtype}")
        return GroupedExperts(weights)
