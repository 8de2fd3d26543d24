"""The default kernel on a CPU: two packed products per expert, computed only for its pairs.

Batch-invariant: the bits of a token do not depend on the other tokens of the call. Rounding is that of the kernel
`reference`: see `PreparedExperts.forward`.
"""

import itertools
import logging

import torch

from experts.kernels.base import ExpertWeights, PreparedExperts
from experts.kernels.cpu.functions import PackedExpertMatrices, compute_experts
from experts.kernels.cpu.library import cpu_library
from experts.kernels.packed_linear import PackedLinear, unavailable_reason
from experts.kernels.reference import ReferenceExperts
from experts.kernels.silu_multiply import silu_and_multiply

_LOG = logging.getLogger(__name__)


class PackedExperts:
    """One layer's experts as packed matrices: gate and up in one, down in another, for each expert."""

    kernel_name = "cpu_packed"

    def __init__(self, weights: ExpertWeights) -> None:
        """Packs expert by expert, so that at most one expert has an additional plain copy."""
        self._inner_size = weights.intermediate_size
        self._gate_up: list[PackedLinear] = []
        self._down: list[PackedLinear] = []
        # One buffer for all experts: a new one for each would fragment the memory of the packed matrices.
        gate_up_2FD = weights.gate_EFD.new_empty((2 * self._inner_size, weights.hidden_size))
        for expert in range(weights.num_experts):
            gate_up_2FD[: self._inner_size] = weights.gate_EFD[expert].detach()
            gate_up_2FD[self._inner_size :] = weights.up_EFD[expert].detach()
            self._gate_up.append(PackedLinear(gate_up_2FD))
            self._down.append(PackedLinear(weights.down_EDF[expert]))
        self._library = cpu_library()
        self._matrices = _matrices(self._gate_up, self._down, self._inner_size)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrices; the plain ones are freed."""
        return sum(linear.nbytes for linear in (*self._gate_up, *self._down))

    def forward(self, x_TD: torch.Tensor, expert_index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """The weighted sum over each token's experts; see `experts.kernels.base.PreparedExperts`."""
        if torch.is_grad_enabled() and (x_TD.requires_grad or weight_TK.requires_grad):
            raise ValueError("the expert kernel cpu_packed has no gradients; train with torch_grouped")
        if x_TD.dtype != self._gate_up[0].dtype or x_TD.shape[1] != self._gate_up[0].in_features:
            raise ValueError(
                f"the rows are {x_TD.dtype} of {x_TD.shape[1]}; these experts take {self._gate_up[0].dtype} of "
                f"{self._gate_up[0].in_features}"
            )
        assert expert_index_TK.shape == weight_TK.shape
        assert expert_index_TK.shape[0] == x_TD.shape[0]
        x_TD, weight_TK = x_TD.detach().contiguous(), weight_TK.detach().contiguous()
        index_TK = expert_index_TK.long().contiguous()
        if self._library is None or self._matrices is None:
            return self._compute(x_TD, index_TK, weight_TK)
        sum_TD = torch.empty_like(x_TD)
        compute_experts(self._library, self._matrices, index_TK, x_TD, weight_TK, sum_TD)
        return sum_TD

    def _compute(self, x_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """Computes with torch's operators, on torch's threads."""
        num_experts = len(self._down)
        if index_TK.numel() and int(index_TK.max()) >= num_experts:
            raise IndexError("an expert's index is too large")
        # The pairs sorted by expert, then by token; pairs without an expert first.
        expert_P, pair_P = index_TK.flatten().sort(stable=True)
        starts = torch.searchsorted(expert_P, torch.arange(num_experts + 1)).tolist()
        used = [(expert, *bounds) for expert, bounds in enumerate(itertools.pairwise(starts)) if bounds[0] < bounds[1]]
        x_PD = x_TD.index_select(0, pair_P // index_TK.shape[1])
        projected_PF = x_PD.new_empty((len(pair_P), 2 * self._inner_size))
        for expert, start, end in used:
            self._gate_up[expert].product_into(x_PD, projected_PF, start, end)
        gate_PF, up_PF = projected_PF[starts[0] :].chunk(2, dim=1)
        inner_PF = x_PD.new_empty((len(pair_P), self._inner_size))
        inner_PF[starts[0] :] = silu_and_multiply(gate_PF, up_PF)
        for expert, start, end in used:
            self._down[expert].product_into(inner_PF, x_PD, start, end)
        pair_P, output_PD = pair_P[starts[0] :], x_PD[starts[0] :]
        weighted_PD = output_PD * weight_TK.flatten()[pair_P, None]
        total_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
        total_TD.index_add_(0, pair_P // index_TK.shape[1], weighted_PD.float())
        return total_TD.to(x_TD.dtype)


def _matrices(gate_up: list[PackedLinear], down: list[PackedLinear], inner_size: int) -> PackedExpertMatrices | None:
    """The matrices for the C library; None if it does not support all of them."""
    gate_up_E = [linear.matrix for linear in gate_up if linear.matrix is not None]
    down_E = [linear.matrix for linear in down if linear.matrix is not None]
    if len(gate_up_E) < len(gate_up) or len(down_E) < len(down):
        return None
    return PackedExpertMatrices(gate_up_E, down_E, inner_size)


class PlainExperts(ReferenceExperts):
    """The fallback of `cpu_packed` for weights that cannot be packed: the kernel `reference`."""

    kernel_name = "cpu_packed (not packed)"


class CpuPackedKernel:
    """Packs weights on a CPU. If that is not possible, computes with the plain ones, and reports why in the log and the
    status.
    """

    @property
    def name(self) -> str:
        """The name in configuration and status."""
        return "cpu_packed"

    def load(self, weights: ExpertWeights) -> PreparedExperts:
        """Packs one layer's weights; the plain ones may be freed afterwards.

        Raises:
            ValueError: the weights are not on the CPU.
        """
        if weights.device.type != "cpu":
            raise ValueError(
                f"the expert kernel cpu_packed computes on the CPU; the weights are on {weights.device}. "
                "Choose auto or megablocks_sparse, or the device cpu"
            )
        reason = unavailable_reason(weights.dtype)
        if reason is not None:
            _LOG.warning("the expert kernel cpu_packed computes with plain weights in %s: %s", weights.dtype, reason)
            return PlainExperts(weights)
        return PackedExperts(weights)
