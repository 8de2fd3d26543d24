"""MegaBlocks' compiled CUDA operations in torch, so that its Python and Triton code runs unchanged.

MegaBlocks 0.10.0 (Gale et al. 2022, arXiv 2211.15841) imports a compiled module `megablocks_ops`. It has no wheels, and
its sources do not compile with CUDA 13. It sorts and counts a few thousand integers. `install` replaces it by this
module if the compiled one is missing. Integer types, in-place outputs, and elements that stay unwritten are those of
the compiled operations; unlike them, these run on any device.
"""

import importlib
import logging
import sys

import torch

_LOG = logging.getLogger(__name__)

_NAME = "megablocks_ops"
_INTEGERS = (torch.int16, torch.int32, torch.int64)


def install() -> None:
    """Makes `import megablocks_ops` work: the compiled module if it can be imported, this one otherwise."""
    if _NAME in sys.modules:
        return
    try:
        importlib.import_module(_NAME)
    except ModuleNotFoundError:
        _LOG.info("megablocks_ops is not installed; its operations run in torch")
    except ImportError as error:
        # Usually compiled against another torch.
        _LOG.warning("the installed megablocks_ops cannot be imported, its operations run in torch: %s", error)
    else:
        return
    sys.modules[_NAME] = sys.modules[__name__]


def sort(x: torch.Tensor, end_bit: int, x_out: torch.Tensor, iota_out: torch.Tensor) -> None:
    """Sorts by the lowest `end_bit` bits, keeping the order of equals.

    Args:
        x: one dimension of int16, int32 or int64.
        end_bit: the number of bits that count. All bits of the type: as signed numbers.
        x_out: receives the sorted values; x's shape and dtype.
        iota_out: receives where each came from; x's shape and dtype.
    """
    _check_integers(x)
    bits = 8 * x.dtype.itemsize
    key = x if end_bit >= bits else x & ((1 << end_bit) - 1)
    order = torch.argsort(key, stable=True)
    x_out.copy_(x[order])
    iota_out.copy_(order)


def histogram(x: torch.Tensor, num_bins: int) -> torch.Tensor:
    """Counts 0 … num_bins - 1; other values are left out.

    Args:
        x: values, or batch × values, of int16, int32 or int64.
        num_bins: the number of bins.

    Returns:
        bins, or batch × bins, int32.
    """
    _check_integers(x)
    value_BN = x.reshape(1, -1) if x.ndim == 1 else x
    # One more bin takes what is left out. Integers, so that the order of the device's additions does not matter.
    bin_BN = torch.where((value_BN < 0) | (value_BN >= num_bins), num_bins, value_BN).long()
    count_BC = torch.zeros((value_BN.shape[0], num_bins + 1), dtype=torch.int32, device=x.device)
    count_BC.scatter_add_(1, bin_BN, torch.ones_like(bin_BN, dtype=torch.int32))
    counted = count_BC[:, :num_bins].contiguous()
    return counted.flatten() if x.ndim == 1 else counted


def inclusive_cumsum(x: torch.Tensor, dim: int, out: torch.Tensor) -> None:
    """Writes `out[b, i] = x[b, 0] + … + x[b, i]`.

    Args:
        x: batch × values of int16, int32 or int64; sums wrap around in that type.
        dim: 1.
        out: x's shape and dtype.
    """
    _check_cumsum(x, dim)
    out.copy_(torch.cumsum(x, 1, dtype=x.dtype))


def exclusive_cumsum(x: torch.Tensor, dim: int, out: torch.Tensor) -> None:
    """Writes `out[b, i] = x[b, 0] + … + x[b, i - 1]`; see `inclusive_cumsum`."""
    _check_cumsum(x, dim)
    out.copy_(torch.cumsum(x, 1, dtype=x.dtype) - x)


def indices(
    padded_bins: torch.Tensor, block_size: int, output_block_rows: int, output_block_columns: int, out: torch.Tensor
) -> None:
    """The block columns of a matrix whose rows lie in bins and whose bin b fills the b-th group of block columns.

    Args:
        padded_bins: int32; where each bin ends, in rows; multiples of `block_size`.
        block_size: rows of a block.
        output_block_rows: block rows of the matrix.
        output_block_columns: block columns of one bin.
        out: int16, `output_block_rows · output_block_columns`; row by row. Block rows of no bin are left as they are.
    """
    if padded_bins.dtype != torch.int32 or out.dtype != torch.int16:
        raise ValueError(f"bins must be int32 and block columns int16, not {padded_bins.dtype} and {out.dtype}")
    row_R = torch.arange(output_block_rows, dtype=torch.int32, device=padded_bins.device)
    end_B = padded_bins // block_size
    bin_R = torch.searchsorted(end_B, row_R, right=True)
    column_C = torch.arange(output_block_columns, device=padded_bins.device)
    column_RC = bin_R[:, None] * output_block_columns + column_C
    out_RC = out.view(output_block_rows, output_block_columns)
    out_RC.copy_(torch.where((bin_R < len(padded_bins))[:, None], column_RC.to(torch.int16), out_RC))


def replicate_forward(x: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
    """Repeats each value over its bin: `out[b, i] = x[b, bin of i]`.

    Args:
        x: batch × bins.
        bins: int32; where each bin ends.
        out: batch × values, in x's dtype. What lies in no bin is left as it is.
    """
    bin_N, inside_N = _bin_of(bins, out.shape[1])
    if x.shape[1]:
        out.copy_(torch.where(inside_N, x[:, bin_N.clamp_max(x.shape[1] - 1)], out))


def replicate_backward(grad: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
    """Sums each bin, in float32: what `replicate_forward` is to gradients.

    Args:
        grad: batch × values, floating-point.
        bins: int32; where each bin ends.
        out: batch × bins, in grad's dtype.
    """
    if not bins.numel():
        return
    bin_N, _ = _bin_of(bins, grad.shape[1])
    # As a product and not by scattered additions, whose order a GPU does not keep.
    member_NB = bin_N[:, None] == torch.arange(len(bins), device=bins.device)
    out.copy_(grad.float() @ member_NB.float())


def _bin_of(bins: torch.Tensor, num_values: int) -> tuple[torch.Tensor, torch.Tensor]:
    place_N = torch.arange(num_values, dtype=bins.dtype, device=bins.device)
    bin_N = torch.searchsorted(bins, place_N, right=True)
    return bin_N, bin_N < len(bins)


def _check_integers(x: torch.Tensor) -> None:
    if x.dtype not in _INTEGERS:
        raise ValueError(f"values must be int16, int32 or int64, not {x.dtype}")


def _check_cumsum(x: torch.Tensor, dim: int) -> None:
    _check_integers(x)
    if x.ndim != 2 or dim != 1:
        raise ValueError(f"sums run along dimension 1 of two, not along {dim} of {x.ndim}")
