"""The default on a CPU: each expert is two packed products, and only the pairs that are there are computed.

The result of a token has the same bits whatever the other tokens of the call. Rounding is that of the kernel
`reference`: see `PreparedExperts.forward`.
"""

import itertools
import logging

import numpy as np
import torch

from experts.kernels import avx512_product
from experts.kernels.base import ExpertWeights, PreparedExperts
from experts.kernels.compiled import Array, Ints, as_array
from experts.kernels.expert_arithmetic import add_pairs, compute_experts, gather_pairs, prepare
from experts.kernels.packed_linear import PackedLinear, unavailable_reason
from experts.kernels.reference import ReferenceExperts
from experts.kernels.silu_multiply import silu_and_multiply

_LOG = logging.getLogger(__name__)


def compile_ahead() -> None:
    """Compiles what loading weights would compile, for a process that forks: computes nothing, so no thread starts."""
    for dtype in (torch.float32, torch.bfloat16):
        avx512_product.unavailable_reason(dtype)
        prepare(dtype)


class PackedExperts:
    """One layer's experts as packed matrices: gate and up in one, down in another, for each expert."""

    kernel_name = "cpu_packed"

    def __init__(self, weights: ExpertWeights) -> None:
        """Packs expert by expert, so that no more than one expert's plain copy exists beside the packed ones."""
        self._inner_size = weights.intermediate_size
        self._gate_up: list[PackedLinear] = []
        self._down: list[PackedLinear] = []
        # One for all: a new one for each expert would leave holes between the packed matrices.
        gate_up_2FD = weights.gate_EFD.new_empty((2 * self._inner_size, weights.hidden_size))
        for expert in range(weights.num_experts):
            gate_up_2FD[: self._inner_size] = weights.gate_EFD[expert].detach()
            gate_up_2FD[self._inner_size :] = weights.up_EFD[expert].detach()
            self._gate_up.append(PackedLinear(gate_up_2FD))
            self._down.append(PackedLinear(weights.down_EDF[expert]))
        self._gate_up_EI, self._down_EI = _described(self._gate_up), _described(self._down)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrices; the plain ones are not kept."""
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
        sum_TD = torch.empty_like(x_TD)
        arrays = index_TK.numpy(), as_array(x_TD), as_array(weight_TK), as_array(sum_TD)
        if self._gate_up_EI is not None and self._down_EI is not None:
            index, x, weight, output = arrays
            compute_experts(index, x, weight, self._gate_up_EI, self._down_EI, self._inner_size, output)
        else:
            self._compute(x_TD, *arrays)
        return sum_TD

    def _compute(self, x_TD: torch.Tensor, index_TK: Ints, x: Array, weight_TK: Array, sum_TD: Array) -> None:
        """As `compute_experts`: product by product, each on as many threads as torch was given."""
        starts_E = np.empty(len(self._down) + 1, dtype=np.int64)
        pair_P = np.empty(index_TK.size, dtype=np.int64)
        x_PD = x_TD.new_empty((index_TK.size, x_TD.shape[1]))
        gather_pairs(index_TK, x, starts_E, pair_P, as_array(x_PD))
        starts: list[int] = starts_E.tolist()
        used = [(expert, *bounds) for expert, bounds in enumerate(itertools.pairwise(starts)) if bounds[0] < bounds[1]]
        projected_PF = x_PD.new_empty((len(pair_P), 2 * self._inner_size))
        for expert, start, end in used:
            self._gate_up[expert].product_into(x_PD, projected_PF, start, end)
        gate_PF, up_PF = projected_PF[: starts[-1]].chunk(2, dim=1)
        inner_PF = silu_and_multiply(gate_PF, up_PF)
        output_PD = torch.empty_like(x_PD)
        for expert, start, end in used:
            self._down[expert].product_into(inner_PF, output_PD, start, end)
        add_pairs(as_array(output_PD), pair_P, starts[-1], weight_TK, sum_TD)


def _described(linears: list[PackedLinear]) -> Ints | None:
    """Their descriptions for compiled functions, one below the other; None where not all have one."""
    described = [linear.compiled for linear in linears if linear.compiled is not None]
    return np.stack(described) if len(described) == len(linears) else None


class PlainExperts(ReferenceExperts):
    """What `cpu_packed` falls back to where weights cannot be packed: the kernel `reference`, named for what it is."""

    kernel_name = "cpu_packed (not packed)"


class CpuPackedKernel:
    """Packs weights on a CPU; where that is not possible it computes with the plain ones, logs why and shows it."""

    @property
    def name(self) -> str:
        """The name by which configuration and status know it."""
        return "cpu_packed"

    def load(self, weights: ExpertWeights) -> PreparedExperts:
        """Packs one layer's weights; they need not be kept.

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
        prepare(weights.dtype)
        return PackedExperts(weights)
