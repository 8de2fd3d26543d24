"""`--every-stage` runs all of these tests; without it only those that a change is most likely to break."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.random_checkpoint import make_random


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, which never end an answer by themselves, so that a process dies in the middle of one."""
    directory = tmp_path_factory.mktemp("checkpoints") / "random"
    make_random(directory)
    return directory


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-stage", action="store_true", help="kill at every stage, bring every bad candidate")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "thorough: runs with --every-stage only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The option is not known where the tests of other folders are run too.
    if config.getoption("--every-stage", default=False):
        return
    left_out: Sequence[pytest.Item] = [item for item in items if item.get_closest_marker("thorough")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
