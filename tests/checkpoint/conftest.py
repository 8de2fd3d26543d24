"""Small checkpoints for these tests: the golden ones."""

import shutil
from pathlib import Path

import pytest

from tests.checkpoint.support import Edit


@pytest.fixture(scope="session", params=["base", "bf16"])
def golden_checkpoint(request: pytest.FixtureRequest, golden_dir: Path) -> Path:
    return golden_dir / str(request.param) / "checkpoint"


@pytest.fixture(scope="session")
def base_checkpoint(golden_dir: Path) -> Path:
    return golden_dir / "base" / "checkpoint"


@pytest.fixture
def broken(base_checkpoint: Path, tmp_path: Path) -> Edit:
    """A copy of a golden checkpoint, with means to break it."""
    directory = tmp_path / "broken"
    shutil.copytree(base_checkpoint, directory)
    for path in (directory, *directory.iterdir()):
        path.chmod(0o755)
    return Edit(directory)
