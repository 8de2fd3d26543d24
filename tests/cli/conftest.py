from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.control_server import System, running_control


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    with running_control(tmp_path) as running:
        yield running


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands print as into a pipe, even where pytest-xdist sets 80 columns for its processes."""
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
