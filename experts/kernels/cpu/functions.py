"""The C library's functions for experts, on tensors: contiguous, on the CPU, float32 or bfloat16, without gradients."""

import ctypes
from collections.abc import Sequence

import torch

from experts.kernels.cpu.library import CpuLibrary, PackedMatrix, check, dtype_code


class PackedExpertMatrices:
    """The matrices of a layer's experts in the library's format.

    The caller must keep the matrices alive.
    """

    def __init__(self, gate_up_E: Sequence[PackedMatrix], down_E: Sequence[PackedMatrix], inner_size: int) -> None:
        """
        Args:
            gate_up_E: gate and up of each expert in one matrix.
            down_E: the down of each expert.
            inner_size: outputs of the gate, and of the up.
        """
        self.num_experts = len(down_E)
        self.inner_size = inner_size
        self.gate_up_E = (PackedMatrix * self.num_experts)(*gate_up_E)
        self.down_E = (PackedMatrix * self.num_experts)(*down_E)


def compute_experts(
    library: CpuLibrary,
    experts: PackedExpertMatrices,
    index_TK: torch.Tensor,
    x_TD: torch.Tensor,
    weight_TK: torch.Tensor,
    sum_TD: torch.Tensor,
) -> None:
    """All experts of a layer in one call; see `experts.kernels.base.PreparedExperts`.

    Args:
        library: the C library.
        experts: the layer's experts.
        index_TK: int64, the expert of every pair; below 0 for none.
        x_TD: tokens × hidden.
        weight_TK: the pairs' weights.
        sum_TD: tokens × hidden; written.

    Raises:
        IndexError: an expert's index is out of range.
        MemoryError: allocating memory failed.
    """
    num_tokens, top_k = index_TK.shape
    check(
        library.compute_experts(
            dtype_code(x_TD.dtype),
            index_TK.data_ptr(),
            num_tokens,
            top_k,
            x_TD.data_ptr(),
            x_TD.shape[1],
            weight_TK.data_ptr(),
            ctypes.addressof(experts.gate_up_E),
            ctypes.addressof(experts.down_E),
            experts.num_experts,
            experts.inner_size,
            sum_TD.data_ptr(),
        )
    )


def swiglu(
    library: CpuLibrary, projected_TF: torch.Tensor, gate_column: int, up_column: int, inner_TF: torch.Tensor
) -> None:
    """silu(gate) · up of the columns of one product, rounded before and after the multiplication.

    Args:
        library: computes.
        projected_TF: tokens × outputs of the product.
        gate_column: where the gate's columns begin.
        up_column: where the columns of `up` begin.
        inner_TF: tokens × inner size; written.
    """
    library.swiglu(
        dtype_code(projected_TF.dtype),
        projected_TF.data_ptr(),
        *projected_TF.shape,
        gate_column,
        up_column,
        inner_TF.shape[1],
        inner_TF.data_ptr(),
    )
