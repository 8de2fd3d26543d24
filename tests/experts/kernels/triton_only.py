"""Which of the tests for Triton can run here, and the reason where they cannot."""

import os
from importlib.util import find_spec

import pytest

_MISSING = [name for name in ("triton", "megablocks", "stk") if find_spec(name) is None]
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HOW = "make triton-check runs this in an environment of its own"

NEEDS_INTERPRETER = pytest.mark.skipif(
    bool(_MISSING) or not _INTERPRETED,
    reason=f"{', '.join(_MISSING)} not installed; {_HOW}" if _MISSING else f"TRITON_INTERPRET is not 1; {_HOW}",
)
NEEDS_COMPILER = pytest.mark.skipif(
    bool(_MISSING) or _INTERPRETED,
    reason=f"{', '.join(_MISSING)} not installed; {_HOW}" if _MISSING else "Triton is set to interpret, not to compile",
)


def take_one_configuration() -> None:
    """Triton tries a kernel's configurations by timing them on a GPU; in the interpreter the first must do."""
    from experts.kernels.gpu_support import import_megablocks

    import_megablocks()
    from megablocks.backend import kernels

    for name in ("_padded_copy", "_padded_copy_wgrad", "_binned_copy", "_binned_copy_wgrad"):
        tuned = getattr(kernels, name)
        tuned.configs = tuned.configs[:1]
