"""Weights in the C library's layout, which `product.h` describes, and their products."""

import ctypes
import functools

import torch
import torch.nn.functional as F

from experts.kernels import onednn_product
from experts.kernels.cpu import library
from experts.kernels.cpu.library import PackedMatrix, cpu_library, dtype_code

# Outputs of a panel: as in `product.h`.
PANEL = 32


class PanelWeights:
    """Implements `experts.kernels.packed_linear.PackedWeights`, on one thread.

    Batch-invariant: the bits of a row depend only on the row.

    Attributes:
        matrix: the descriptor for the C library, valid as long as this object exists. None for a number of inputs that
            needs padding.
        nbytes: see `PackedWeights`.
    """

    __slots__ = (
        "_bias_O",
        "_compute",
        "_element_size",
        "_matrix",
        "_out_features",
        "_weights",
        "matrix",
        "nbytes",
    )

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        """Copies the weights, directly into the layout.

        Args:
            weight_OI: outputs × inputs, of a supported dtype: see `unavailable_reason`.
            bias_O: outputs.
        """
        code = cpu_library()
        assert code is not None
        dtype = weight_OI.dtype
        self._out_features, in_features = weight_OI.shape
        # One step of a panel takes two inputs in bfloat16.
        unit = 2 if dtype == torch.bfloat16 else 1
        steps = -(-in_features // unit)
        panels = -(-self._out_features // PANEL)
        # Both float32 and a pair of bfloat16 are moved as 32 bits.
        self._weights = torch.zeros(panels, steps, PANEL, dtype=torch.int32)
        rows_OS = _as_steps(weight_OI.detach(), unit)
        whole = self._out_features // PANEL
        split = whole * PANEL
        self._weights[:whole].copy_(rows_OS[:split].view(whole, PANEL, steps).transpose(1, 2))
        if split < self._out_features:
            self._weights[whole, :, : self._out_features - split] = rows_OS[split:].T
        self._bias_O = torch.zeros(panels * PANEL)
        if bias_O is not None:
            self._bias_O[: self._out_features] = bias_O.detach()
        self._element_size = weight_OI.element_size()
        self._matrix = PackedMatrix(self._weights.data_ptr(), self._bias_O.data_ptr(), steps, self._out_features)
        self.matrix = self._matrix if steps * unit == in_features else None
        self._compute = functools.partial(code.product, dtype_code(dtype), ctypes.addressof(self._matrix))
        self.nbytes = self._weights.nbytes + self._bias_O.nbytes

    def warm_up_sizes(self, max_rows: int) -> list[int]:
        """Empty, because the code is the same for all numbers of rows."""
        return []

    def product(self, x_TI: torch.Tensor) -> torch.Tensor:
        rows = x_TI.shape[0]
        output_TO = x_TI.new_empty((rows, self._out_features))
        self.product_into(x_TI, output_TO, 0, rows)
        return output_TO

    def product_into(self, x_TI: torch.Tensor, output_TO: torch.Tensor, first: int, end: int) -> None:
        if self.matrix is None:
            x_TI = F.pad(x_TI, (0, 1))
        elif x_TI.stride(1) != 1:
            x_TI = x_TI.contiguous()
        x_stride = x_TI.stride(0) * self._element_size
        output_stride = self._out_features * self._element_size
        self._compute(
            x_TI.data_ptr() + first * x_stride,
            x_stride,
            end - first,
            output_TO.data_ptr() + first * output_stride,
            output_stride,
        )


def unavailable_reason(dtype: torch.dtype) -> str | None:
    """Why weights of a dtype cannot have this layout here, as text for a log; None if they can."""
    code = cpu_library()
    if code is None:
        return f"there is no C library: {library.unavailable_reason()}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the C library has no product for {dtype}"
    if not code.named and onednn_product.unavailable_reason(dtype) is None:
        if code.variant == "plain":
            return "the processor has neither AVX2 nor AVX-512, and oneDNN multiplies faster than plain C"
        if dtype == torch.bfloat16 and code.has_matrix_instructions:
            return "the processor multiplies whole matrices of bfloat16 (AMX), which oneDNN uses"
    return None


def _as_steps(weight_OI: torch.Tensor, unit: int) -> torch.Tensor:
    """Outputs × steps, each of 32 bits."""
    if weight_OI.shape[1] % unit:
        weight_OI = F.pad(weight_OI, (0, unit - weight_OI.shape[1] % unit))
    return weight_OI.contiguous().view(torch.int32)
