"""Loads the C library of this folder and chooses the variant of it that the processor runs.

The declarations here must match those in `kernels.c`: the structures, the arguments, and the interface version.
"""

import ctypes
import functools
import logging
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_LOG = logging.getLogger(__name__)

# From the fastest to the one for every processor.
VARIANTS = ("avx512_bf16", "avx512", "avx2", "plain")
# Selects one of the variants, or NONE, for comparisons or as a workaround.
ENVIRONMENT = "ECHORAY_CPU_VARIANT"
NONE = "none"

_INTERFACE_VERSION = 1
_FILE = Path(__file__).parent / f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_NO_SUCH_EXPERT, _OUT_OF_MEMORY = 1, 2

# The types of arguments and results; addresses are passed as 64-bit integers.
_P, _N, _F, _R = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[type[ctypes.c_int64] | None, tuple[type, ...]]] = {
    "product": (None, (_N, _P, _P, _N, _N, _P, _N)),
    "swiglu": (None, (_N, _P, _N, _N, _N, _N, _N, _P)),
    "compute_experts": (_R, (_N, _P, _N, _N, _P, _N, _P, _P, _P, _N, _N, _P)),
    "normalize": (None, (_N, _P, _P, _F, _N, _N, _P)),
    "rotate_and_store": (None, (_P, _P, _P, _P)),
    "attend_decoding": (_R, (_P, _P, _P, _P)),
    "attend_to_sequences": (_R, (_P, _P, _P, _P, _P)),
    "project_and_normalize": (None, (_P, _N, _P, _P, _P, _P)),
    "dense_and_shared": (_R, (_P, _N, _P, _P, _P, _P)),
    "mix": (None, (_N, _P, _P, _P, _P, _P, _N, _N, _N, _N, _P)),
}


class PackedMatrix(ctypes.Structure):
    """The weights of a linear layer; see `kernels.c`. Does not keep the memory that it points to."""

    _fields_ = (("weights", _P), ("bias", _P), ("steps", _N), ("outputs", _N))


class AttentionLayer(ctypes.Structure):
    """One layer's attention and both norms; see `kernels.c`. Does not keep the memory that it points to."""

    _fields_ = (
        *((name, _N) for name in ("dtype", "hidden_size", "query_heads", "kv_heads", "head_dim", "block_size")),
        *((name, _P) for name in ("keys_SHD", "values_SHD", "norm_before_D", "norm_after_D", "qkv", "output")),
        *((name, _F) for name in ("scaling", "epsilon_before", "epsilon_after")),
    )


class StepTokens(ctypes.Structure):
    """The tokens of one step; see `kernels.c`. Does not keep the memory that it points to."""

    _fields_ = (
        ("tokens", _N),
        ("cos_TD", _P),
        ("sin_TD", _P),
        ("slots_T", _P),
        ("sequences", _N),
        ("blocks", _N),
        ("rows_B", _P),
        ("block_tables_BN", _P),
        ("lengths_B", _P),
    )


class DenseLayer(ctypes.Structure):
    """Dense MLP and shared expert of a layer; see `kernels.c`. Does not keep the memory that it points to."""

    _fields_ = (
        *((name, _N) for name in ("dtype", "hidden_size", "dense_size", "shared_size")),
        *((name, _P) for name in ("inputs", "dense_down", "shared_down")),
    )


class CpuLibrary:
    """One variant of the library. Its functions take addresses and release the interpreter's lock.

    Attributes:
        variant: which of `VARIANTS` it is.
        named: whether `ECHORAY_CPU_VARIANT` selected it; then it computes all that it can.
        has_matrix_instructions: whether the processor has AMX for bfloat16, which this library does not use.
    """

    product: Callable[..., None]
    swiglu: Callable[..., None]
    compute_experts: Callable[..., int]
    normalize: Callable[..., None]
    rotate_and_store: Callable[..., None]
    attend_decoding: Callable[..., int]
    attend_to_sequences: Callable[..., int]
    project_and_normalize: Callable[..., None]
    dense_and_shared: Callable[..., int]
    mix: Callable[..., None]

    def __init__(self, path: Path, variant: str | None) -> None:
        """
        Args:
            path: the shared library.
            variant: one of `VARIANTS`; None chooses the fastest that the processor runs.

        Raises:
            OSError: there is no such file, or it cannot be loaded.
            ValueError: it was built from another version of its source, or the processor does not run the variant.
        """
        library: Any = ctypes.CDLL(str(path))
        if (version := int(library.interface_version())) != _INTERFACE_VERSION:
            raise ValueError(
                f"the library was built from another version ({version}) of its source; install the package again"
            )
        supported = [name for name in VARIANTS if library.variant_supported(name.encode())]
        if variant is not None and variant not in supported:
            raise ValueError(f"{ENVIRONMENT} is {variant!r}; this processor runs {', '.join(supported)}")
        self.variant = variant or supported[0]
        self.named = variant is not None
        self.has_matrix_instructions = bool(library.has_matrix_instructions())
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, f"{self.variant}_{name}")
            function.argtypes, function.restype = arguments, result
            setattr(self, name, function)


def cpu_library() -> CpuLibrary | None:
    """The library, loaded once per process; None if it is unavailable: see `unavailable_reason`.

    Raises:
        ValueError: `ECHORAY_CPU_VARIANT` names an unknown variant, or one that the processor does not support.
    """
    found = _load(os.environ.get(ENVIRONMENT))
    return None if isinstance(found, str) else found


def unavailable_reason() -> str | None:
    """Why the library is unavailable, as text for a log; None if it is available."""
    found = _load(os.environ.get(ENVIRONMENT))
    return found if isinstance(found, str) else None


@functools.cache
def _load(variant: str | None) -> CpuLibrary | str:
    if variant is not None and variant not in (*VARIANTS, NONE):
        raise ValueError(f"{ENVIRONMENT} is {variant!r}; it may be {', '.join((*VARIANTS, NONE))}")
    if variant == NONE:
        reason = f"{ENVIRONMENT} is {NONE}"
    elif not _FILE.exists():
        reason = "it was not built: the package was installed without a C compiler that builds it"
    else:
        try:
            library = CpuLibrary(_FILE, variant)
        except OSError as error:
            reason = f"it cannot be loaded: {error}"
        except ValueError as error:
            if variant is not None:
                raise
            reason = str(error)
        else:
            _LOG.info("the C library computes on the CPU, in the variant %s", library.variant)
            return library
    _LOG.warning("oneDNN and torch compute on the CPU, without the C library: %s", reason)
    return reason


def dtype_code(dtype: torch.dtype) -> int:
    """The library's code of a dtype, which must be float32 or bfloat16."""
    return _DTYPES[dtype]


def check(result: int) -> None:
    """Raises an exception for the return code of a function.

    Raises:
        IndexError: an expert's index is out of range.
        MemoryError: allocating memory failed.
    """
    if result == _NO_SUCH_EXPERT:
        raise IndexError("an expert's index is too large")
    if result == _OUT_OF_MEMORY:
        raise MemoryError("no memory is left for the intermediate results of a layer")
