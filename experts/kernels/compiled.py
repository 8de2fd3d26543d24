"""What functions share that Numba compiles for a CPU, to take the place of several operators of torch.

With few rows an operator of torch costs more to call than to compute. Numba compiles these functions when they are
first called and keeps the code on disk, beside the file of the function, until that file or one of those in `_INLINED`
changes. They round where torch's operators on the same dtype do. Each row is computed by itself,
so its bits do not depend on the others. bfloat16 goes in and out as the uint16 of the same bits: see `as_array`.
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from numba.extending import overload

from experts.private_folder import private_folder

_LOG = logging.getLogger(__name__)

# float32, or bfloat16 as uint16.
Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Function = TypeVar("Function", bound=Callable[..., Any])

# "numpy": a division by zero gives infinity, as with torch, and not an exception for which each would have to look.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
# Of this folder: what compiled functions of other files have in their code.
_INLINED = ("compiled.py", "compiled_product.py", "expert_arithmetic.py")
# Sums may be taken in any order, but a loop is compiled once: the order is the same for all rows.
SUMMING = {"reassoc", "contract", "nsz"}
# Cody and Waite's split of ln 2, and the polynomial of Cephes' expf: within 2 units in the last place.
_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_EXP_LOWEST = np.float32(-87.0)
_EXP_5 = np.float32(1.9875691500e-4)
_EXP_4 = np.float32(1.3981999507e-3)
_EXP_3 = np.float32(8.3334519073e-3)
_EXP_2 = np.float32(4.1665795894e-2)
_EXP_1 = np.float32(1.6666665459e-1)
_EXP_0 = np.float32(5.0000001201e-1)


@contextmanager
def one_process_at_a_time() -> Iterator[None]:
    """For what compiles: of several processes that start together one does it, and the others find what it kept."""
    with FileLock(private_folder() / "compile.lock", mode=0o600):
        yield


def as_array(tensor: torch.Tensor) -> Array:
    """The same memory for compiled functions; the tensor must be contiguous, on the CPU and need no gradient."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def compiled(**options: Any) -> Callable[[Function], Function]:
    """For functions that are called from Python; `options` are Numba's."""

    def compile_function(function: Function) -> Function:
        try:
            kept: Any = numba.njit(cache=True, **_OPTIONS, **options)(function)
        except RuntimeError as error:
            # Numba finds no folder that it may write to.
            _LOG.warning("compiled code of %s is not kept: %s", function.__name__, error)
            return cast("Function", numba.njit(**_OPTIONS, **options)(function))
        # Numba looks at the function's own file alone, and would go on using code that has others' in it.
        kept_file = kept._cache._cache_file
        kept_file._source_stamp = (kept_file._source_stamp, _inlined_digest())
        return cast("Function", kept)

    return compile_function


@functools.cache
def _inlined_digest() -> str:
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in _INLINED)).hexdigest()


def inlined(**options: Any) -> Callable[[Function], Function]:
    """For parts of compiled functions."""
    return cast("Callable[[Function], Function]", numba.njit(**_OPTIONS, **options))


@inlined()
def widened(bits: Any) -> Any:
    """The float32 of a bfloat16's bits."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@inlined()
def narrowed(x: Any) -> Any:
    """The bits of the nearest bfloat16, of two equally near ones the even; NaN stays NaN."""
    bits = np.float32(x).view(np.uint32)
    nearest = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    return nearest if x == x else np.uint16(0x7FC0)


def load(element: Any) -> Any:
    """An element as float32."""
    raise NotImplementedError("compiled code only")


@overload(load)
def _overload_load(element: Any) -> Any:
    def from_bfloat16(element: Any) -> Any:
        return widened(element)

    def from_float32(element: Any) -> Any:
        return element

    return from_bfloat16 if element == numba.uint16 else from_float32


def stored(x: Any, like: Any) -> Any:
    """A float32 as an element of an array like this one."""
    raise NotImplementedError("compiled code only")


@overload(stored)
def _overload_stored(x: Any, like: Any) -> Any:
    def to_bfloat16(x: Any, like: Any) -> Any:
        return narrowed(x)

    def to_float32(x: Any, like: Any) -> Any:
        return x

    return to_bfloat16 if like.dtype == numba.uint16 else to_float32


@inlined()
def rounded(x: Any, like: Any) -> Any:
    """A float32 rounded to what an array like this one can hold, as float32."""
    return load(stored(x, like))


@inlined()
def exp(x: Any) -> Any:
    """e to the power of x, for x ≤ 0; NaN for NaN. Without a branch, so that loops become vector code."""
    x = _EXP_LOWEST if x < _EXP_LOWEST else x
    power = np.floor(x * _LOG2_E + np.float32(0.5))
    rest = x - power * _LN2_HIGH - power * _LN2_LOW
    series = ((((_EXP_5 * rest + _EXP_4) * rest + _EXP_3) * rest + _EXP_2) * rest + _EXP_1) * rest + _EXP_0
    scale = np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (series * rest * rest + rest + np.float32(1)) * scale
