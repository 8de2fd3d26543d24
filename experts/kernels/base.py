"""The interface of all expert kernels.

A kernel computes, for every token, `Σ_k weight[t, k] · SwiGLU_{expert_index[t, k]}(x[t])` with
`SwiGLU(x) = down(silu(gate(x)) · up(x))`, no biases (Shazeer 2020, arXiv 2002.05202).
"""

from dataclasses import dataclass
from typing import Protocol

import torch

# Marks a (token, k) pair whose expert is in another group.
NO_EXPERT = -1


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One layer's experts, stacked. F is the intermediate size, D the hidden size, E the number of experts."""

    gate_EFD: torch.Tensor
    up_EFD: torch.Tensor
    down_EDF: torch.Tensor

    @property
    def num_experts(self) -> int:
        """The number of experts."""
        return self.gate_EFD.shape[0]

    @property
    def intermediate_size(self) -> int:
        """The intermediate size of an expert."""
        return self.gate_EFD.shape[1]

    @property
    def hidden_size(self) -> int:
        """The hidden size."""
        return self.gate_EFD.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The element type of all three."""
        return self.gate_EFD.dtype

    @property
    def device(self) -> torch.device:
        """The device of all three."""
        return self.gate_EFD.device

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return self.gate_EFD.nbytes + self.up_EFD.nbytes + self.down_EDF.nbytes


class PreparedExperts(Protocol):
    """One layer's experts in the kernel's layout.

    May have a property `kernel_name: str`, if the status should show more than the kernel's name: see `kernel_in_use`.
    """

    @property
    def nbytes(self) -> int:
        """Resident bytes of the prepared weights."""
        ...

    def forward(self, x_TD: torch.Tensor, expert_index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """The weighted sum over each token's experts.

        Args:
            x_TD: tokens × hidden, in the weights' dtype.
            expert_index_TK: int32 or int64, from 0; `NO_EXPERT` for pairs of other groups.
            weight_TK: weights of the pairs, in x's dtype.

        Returns:
            tokens × hidden in x's dtype. Each expert's weighted output is rounded to that dtype, as in the released
            code; the sum over k is taken in float32, in the order of the experts.
        """
        ...


class ExpertKernel(Protocol):
    """A kernel: computes experts, holds no weights."""

    @property
    def name(self) -> str:
        """The name in configuration and status."""
        ...

    def load(self, weights: ExpertWeights) -> PreparedExperts:
        """Prepares one layer's weights; may keep, repack or move them.

        Raises:
            ValueError: the kernel cannot compute weights of this dtype or on this device.
        """
        ...


def kernel_in_use(kernel: ExpertKernel, prepared: PreparedExperts) -> str:
    """The name of the kernel that computes, for the status: kernels that choose or fall back have it in their prepared
    weights.
    """
    return str(getattr(prepared, "kernel_name", kernel.name))
