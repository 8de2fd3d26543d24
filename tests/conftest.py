"""Fixtures that every test folder shares."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.running_system import ECHORAY, RunningSystem, running

ROOT = Path(__file__).resolve().parent.parent
# Tests that start Ray or a whole system. They run one after another, in one process: they share a system and its ports,
# and some count what is left running.
SYSTEMS = (
    "tests/cli/test_evaluation.py",
    "tests/cli/test_serve.py",
    "tests/clients_node",
    "tests/end_to_end",
    "tests/serving/deploy/test_applications.py",
    "tests/serving/cluster/test_endpoints.py",
    "tests/serving/cluster/test_metrics.py",
    "tests/serving/deploy/test_niceness.py",
    "tests/test_docs.py",
    "tests/training/test_workers.py",
)


# How long an example takes depends on what else the machine does.
settings.register_profile("echovlm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("echovlm")


def starts_system(node_id: str) -> bool:
    """Whether a test is one of `SYSTEMS`."""
    return node_id.startswith(SYSTEMS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the tests of systems: they take longest, and mostly wait while the other process runs the rest."""
    items.sort(key=lambda item: not starts_system(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """With `-n 2`: tests of systems stay together in one process, all others by file."""
    from xdist.scheduler import LoadScopeScheduling

    # What pytest-xdist's own schedulers override, by file or by mark.
    assert "_split_scope" in vars(LoadScopeScheduling)

    class SystemsTogether(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "systems" if starts_system(nodeid) else nodeid.split("::")[0]

    return SystemsTogether(config, log)


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
