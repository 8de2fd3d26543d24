from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.control_server import System, running_control


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    with running_control(tmp_path) as running:
        yield running
