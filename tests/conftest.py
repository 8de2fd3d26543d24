"""Fixtures that every test folder shares."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The reference implementation's own outputs, kept beside the repository."""
    path = ROOT.parent / "shared" / "golden"
    if not path.is_dir():
        pytest.fail(f"the golden cases are expected at {path}: lay the folder shared/ beside the repository")
    return path
