"""Chooses among the variants of the C library; tests of it are skipped where there is no compiler to build it."""

import os
import shlex
import subprocess
import sysconfig

import pytest

from experts.kernels.cpu.library import ENVIRONMENT, CpuLibrary, cpu_library, unavailable_reason


def choose_variant(monkeypatch: pytest.MonkeyPatch, name: str) -> CpuLibrary:
    """Computes with a variant for the rest of the test, which is skipped where the processor does not run it."""
    need_library()
    monkeypatch.setenv(ENVIRONMENT, name)
    try:
        library = cpu_library()
    except ValueError as error:
        pytest.skip(str(error))
    assert library is not None
    assert library.variant == name
    return library


def need_library() -> None:
    """Skips the test where the library was not built because there is no compiler; fails where there is one."""
    if cpu_library() is None:
        assert not _compiler_works(), f"the machine has a C compiler: {unavailable_reason()}"
        pytest.skip(str(unavailable_reason()))


def _compiler_works() -> bool:
    command = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    try:
        return subprocess.run([*shlex.split(command), "--version"], capture_output=True).returncode == 0
    except OSError:
        return False
