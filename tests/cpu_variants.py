"""Chooses among the variants of the C library."""

import pytest

from experts.kernels.cpu.library import ENVIRONMENT, CpuLibrary, cpu_library


def choose_variant(monkeypatch: pytest.MonkeyPatch, name: str) -> CpuLibrary:
    """Computes with a variant for the rest of the test, which is skipped where the processor does not run it."""
    monkeypatch.setenv(ENVIRONMENT, name)
    try:
        library = cpu_library()
    except ValueError as error:
        pytest.skip(str(error))
    assert library is not None, "the tests need a C compiler when the package is installed"
    assert library.variant == name
    return library
