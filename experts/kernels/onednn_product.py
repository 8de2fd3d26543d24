"""Weights in the blocks that oneDNN's matrix kernels read, and their product with some numbers of rows.

The operators are private parts of torch (its compiler uses them), so they are tested before use.
"""

from typing import Any

import torch
import torch.nn.functional as F

from experts.kernels.cpu.library import PackedMatrix

# The number of rows for which oneDNN lays out the weights. They can be used with any number of rows.
_EXPECTED_ROWS = 16
# More rows are computed in pieces of this size: as fast, and without further sizes.
MAX_ROWS = 512
# The most rows of padding.
_MAX_PADDING = 15
_DTYPES = (torch.float32, torch.bfloat16)


class OneDnnWeights:
    """Implements `experts.kernels.packed_linear.PackedWeights`.

    A row's bits do not depend on the number of rows and of threads, for up to 16384 inputs (beyond, oneDNN may share
    the sum of one float32 output among threads).
    """

    __slots__ = ("_bias_O", "_linear", "_packed", "nbytes")

    matrix: PackedMatrix | None = None

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        """
        Args:
            weight_OI: outputs × inputs, of a supported dtype: see `unavailable_reason`.
            bias_O: outputs, in the weight's dtype.
        """
        self._bias_O = None if bias_O is None else bias_O.detach()
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(
            weight_OI.detach().contiguous(), _EXPECTED_ROWS
        )
        # With oneDNN's own padding.
        self.nbytes = int(torch.ops.mkldnn._nbytes(self._packed)) + (0 if bias_O is None else bias_O.nbytes)
        # Resolved once: looking an operator up by name costs as much as a small product.
        self._linear: Any = torch.ops.mkldnn._linear_pointwise.default

    def warm_up_sizes(self, max_rows: int) -> list[int]:
        """All numbers of rows that are ever computed; oneDNN compiles for each on first use."""
        return sorted({padded_rows(rows) for rows in range(1, min(max_rows, MAX_ROWS) + 1)})

    def product(self, x_TI: torch.Tensor) -> torch.Tensor:
        rows = x_TI.shape[0]
        if rows > MAX_ROWS:
            return torch.cat([self.product(piece) for piece in x_TI.split(MAX_ROWS)])
        padded = padded_rows(rows)
        if padded > rows:
            x_TI = F.pad(x_TI, (0, 0, 0, padded - rows))
        output_TO: torch.Tensor = self._linear(x_TI, self._packed, self._bias_O, "none", [], "")
        return output_TO[:rows]

    def product_into(self, x_TI: torch.Tensor, output_TO: torch.Tensor, first: int, end: int) -> None:
        output_TO[first:end] = self.product(x_TI[first:end])


def padded_rows(rows: int) -> int:
    """The padded number of rows, for 1 to `MAX_ROWS` rows.

    oneDNN generates and caches code for every number of rows (0.15 MB each, up to a thousand of them). Without padding,
    a process would grow and compile while it serves. So there are four sizes between a power of two and the next up to
    64 rows, and every sixteenth above: 47 in total.

    A single row is padded to two: oneDNN sums it in larger blocks than two or more rows, which changes the last bits
    from 1025 inputs on. The second row costs almost nothing, because the weights are read once.
    """
    if rows == 1:
        return 2
    step = min(_MAX_PADDING + 1, max(1, 1 << (rows - 1).bit_length() >> 3))
    return -(-rows // step) * step


def unavailable_reason(dtype: torch.dtype) -> str | None:
    """Why weights of a dtype cannot have this layout here, as text; None if they can."""
    if dtype not in _DTYPES:
        return f"only {' and '.join(str(known) for known in _DTYPES)} are"
    if not torch.backends.mkldnn.is_available():
        return f"torch {torch.__version__} was built without oneDNN"
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "the processor has no instructions for bfloat16 that oneDNN uses"
        OneDnnWeights(torch.zeros(16, 16, dtype=dtype), None).product(torch.zeros(1, 16, dtype=dtype))
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"torch {torch.__version__} has no such operators ({type(error).__name__})"
    return None
