"""A function of stored values over a picture, without a copy of it in 64 bits."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

_ROWS_AT_ONCE = 64


def evaluated(
    frame: npt.NDArray[Any], function: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.uint8]]
) -> npt.NDArray[np.uint8]:
    """`function` of each value; where a frame has more values than there can be, of each possible one once.

    Args:
        frame: of any shape and any numeric type.
        function: maps float64 to uint8, value by value.
    """
    bits = frame.dtype.itemsize * 8
    result = np.empty(frame.shape, np.uint8)
    if frame.dtype.kind in "ui" and bits <= 16 and frame.size > 1 << bits:
        unsigned = np.dtype(f"u{frame.dtype.itemsize}")
        domain = np.arange(1 << bits, dtype=np.uint32).astype(unsigned)
        table = function(domain.view(frame.dtype).astype(np.float64))
        # Some rows at a time, because NumPy makes 64-bit integers of indices.
        for top in range(0, len(frame), _ROWS_AT_ONCE):
            result[top : top + _ROWS_AT_ONCE] = table[frame[top : top + _ROWS_AT_ONCE].view(unsigned)]
        return result
    for top in range(0, len(frame), _ROWS_AT_ONCE):
        result[top : top + _ROWS_AT_ONCE] = function(frame[top : top + _ROWS_AT_ONCE].astype(np.float64))
    return result
