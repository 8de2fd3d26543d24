"""Products within compiled functions: see `experts.kernels.compiled` and `experts.kernels.avx512_code`.

A compiled function that computes a product itself saves the way back to Python and all that torch does for a call,
which for a single row takes as long as the arithmetic around it.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from experts.kernels.avx512_code import NUM_ARGUMENTS
from experts.kernels.compiled import Array, Ints, inlined

# What an array that describes a layer's weights has: see `describe`.
_FUNCTION, _WEIGHTS, _STEPS, _BIAS, _OUTPUTS = range(5)


def describe(*, function: int, weights: int, steps: int, bias: int, outputs: int) -> Ints:
    """A layer's weights for `multiply`: addresses and sizes, as in `experts.kernels.avx512_code`.

    The memory at those addresses must be kept as long as it is.
    """
    return np.array([function, weights, steps, bias, outputs], dtype=np.int64)


@inlined()
def multiply(product_I: Ints, x_TI: Array, first: int, end: int, output_TO: Array) -> None:
    """For compiled functions: writes the outputs of rows from `first` to `end` where such rows are in `output_TO`."""
    rows = end - first
    if rows > 0:
        _call(
            product_I[_FUNCTION],
            product_I[_WEIGHTS],
            product_I[_STEPS],
            product_I[_BIAS],
            product_I[_OUTPUTS],
            np.int64(x_TI.ctypes.data) + first * x_TI.strides[0],
            x_TI.strides[0],
            rows,
            np.int64(output_TO.ctypes.data) + first * output_TO.strides[0],
            output_TO.strides[0],
        )


@intrinsic
def _call(typing_context: Any, function: Any, *arguments: Any) -> Any:
    """Calls a function by its address; its arguments, addresses among them, are integers."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        integer = ir.IntType(64)
        signature_of_function = ir.FunctionType(ir.VoidType(), [integer] * NUM_ARGUMENTS)
        address = builder.inttoptr(values[0], signature_of_function.as_pointer())
        builder.call(address, [builder.extract_value(values[1], place) for place in range(NUM_ARGUMENTS)])
        return context.get_dummy_value()

    integers: Any = types.StarArgTuple([types.int64] * NUM_ARGUMENTS)  # type: ignore[no-untyped-call]
    return types.void(types.int64, integers), generate
