"""Fixtures that every test folder shares."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running_system import ECHORAY, RunningSystem, running

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The reference implementation's own outputs."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, made by the command that users type."""
    directory = tmp_path_factory.mktemp("checkpoints") / "demo"
    subprocess.run([ECHORAY, "checkpoint", "demo", directory], check=True, capture_output=True, timeout=120)
    return directory


@pytest.fixture(scope="session")
def running_system(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    """The whole system on the demo checkpoint, started once by `echoray serve` and shared by all tests."""
    with running(demo_checkpoint, tmp_path_factory.mktemp("system")) as system:
        yield system
