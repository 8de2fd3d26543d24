"""Weights in the layout of `experts.kernels.avx512_code`, and their product with any number of rows."""

import functools

import torch
import torch.nn.functional as F

from experts.kernels.avx512_code import (
    PANEL,
    address_of,
    compiled_product,
    inputs_of_step,
    missing_instructions,
)
from experts.kernels.compiled_product import describe


class Avx512Weights:
    """Implements `experts.kernels.packed_linear.PackedWeights`, on one thread.

    A row's bits depend on nothing but the row.

    Attributes:
        compiled: describes it for `experts.kernels.compiled_product.multiply`, as long as it lives. None for a number
            of inputs that needs padding.
        nbytes: see `PackedWeights`.
    """

    __slots__ = (
        "_bias_O",
        "_compute",
        "_element_size",
        "_in_features",
        "_out_features",
        "_steps",
        "_weights",
        "compiled",
        "nbytes",
    )

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        """Copies the weights, directly into the layout.

        Args:
            weight_OI: outputs × inputs, of a dtype for which `unavailable_reason` knows none.
            bias_O: outputs.
        """
        dtype = weight_OI.dtype
        self._out_features, self._in_features = weight_OI.shape
        unit = inputs_of_step(dtype)
        self._steps = -(-self._in_features // unit)
        panels = -(-self._out_features // PANEL)
        # Both float32 and a pair of bfloat16 are moved as 32 bits.
        self._weights = torch.zeros(panels, self._steps, PANEL, dtype=torch.int32)
        assert self._weights.data_ptr() % 64 == 0
        rows_OS = _as_steps(weight_OI.detach(), unit)
        whole = self._out_features // PANEL
        split = whole * PANEL
        self._weights[:whole].copy_(rows_OS[:split].view(whole, PANEL, self._steps).transpose(1, 2))
        if split < self._out_features:
            self._weights[whole, :, : self._out_features - split] = rows_OS[split:].T
        self._bias_O = torch.zeros(panels * PANEL)
        if bias_O is not None:
            self._bias_O[: self._out_features] = bias_O.detach()
        self._element_size = weight_OI.element_size()
        code = compiled_product(dtype)
        weights, bias = self._weights.data_ptr(), self._bias_O.data_ptr()
        self.compiled = None
        if self._steps * unit == self._in_features:
            self.compiled = describe(
                function=address_of(code),
                weights=weights,
                steps=self._steps,
                bias=bias,
                outputs=self._out_features,
            )
        self._compute = functools.partial(code, weights, self._steps, bias, self._out_features)
        self.nbytes = self._weights.nbytes + self._bias_O.nbytes

    def warm_up_sizes(self, max_rows: int) -> list[int]:
        """None: there is one code for all numbers of rows."""
        return []

    def product(self, x_TI: torch.Tensor) -> torch.Tensor:
        """See `PackedWeights`."""
        rows = x_TI.shape[0]
        output_TO = x_TI.new_empty((rows, self._out_features))
        self.product_into(x_TI, output_TO, 0, rows)
        return output_TO

    def product_into(self, x_TI: torch.Tensor, output_TO: torch.Tensor, first: int, end: int) -> None:
        """See `PackedWeights`."""
        if self.compiled is None:
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


@functools.cache
def unavailable_reason(dtype: torch.dtype) -> str | None:
    """Why weights of a dtype are not laid out like this here, in words for a log; None where they are."""
    reason = missing_instructions(dtype)
    if reason is not None:
        return reason
    try:
        compiled_product(dtype)
    except RuntimeError as error:
        return f"LLVM does not compile the code: {error}"
    return None


def _as_steps(weight_OI: torch.Tensor, unit: int) -> torch.Tensor:
    """Outputs × steps, each of 32 bits."""
    if weight_OI.shape[1] % unit:
        weight_OI = F.pad(weight_OI, (0, unit - weight_OI.shape[1] % unit))
    return weight_OI.contiguous().view(torch.int32)
