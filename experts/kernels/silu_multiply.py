"""silu(gate) · up on the CPU, batch-invariant: a row's bits do not depend on the number of rows and threads."""

import torch
import torch.nn.functional as F

# torch splits an element-wise loop over threads from 32768 elements on, anywhere in a row, and computes what is left
# at the end of a piece with another exponential than the rest, which differs in the last bit. Smaller pieces, each of
# whole rows of a strided view, meet the end of a row always at the same columns.
_PIECE_ELEMENTS = 32768 - 1
_PIECE_COLUMNS = 8192


def silu_and_multiply(gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
    """The inner part of SwiGLU; overwrites `gate_NF`.

    Args:
        gate_NF: rows × inner size: columns of a wider matrix, so that no row touches the next.
        up_NF: the same shape.

    Returns:
        rows × inner size, contiguous.
    """
    num_rows, inner_size = gate_NF.shape
    if num_rows * inner_size <= _PIECE_ELEMENTS:
        return F.silu(gate_NF, inplace=True) * up_NF
    inner_NF = gate_NF.new_empty((num_rows, inner_size))
    columns = min(inner_size, _PIECE_COLUMNS)
    rows = max(1, _PIECE_ELEMENTS // columns)
    for row in range(0, num_rows, rows):
        for column in range(0, inner_size, columns):
            end = min(column + columns, inner_size)
            gate = F.silu(gate_NF[row : row + rows, column:end], inplace=True)
            torch.mul(gate, up_NF[row : row + rows, column:end], out=inner_NF[row : row + rows, column:end])
    return inner_NF
