"""A client in another language, made from protos/ alone, streams an answer of the running system."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydicom.data import get_testdata_file

from tests.running_system import RunningSystem

HERE = Path(__file__).resolve().parent
PROTOS = HERE.parent.parent / "protos"

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or shutil.which("npm") is None, reason="Node and npm are not installed on this machine"
)


@pytest.fixture(scope="session")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Node program with its packages, and a copy of the .proto files with no Python beside them."""
    directory = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json", "stream.js"):
        shutil.copy(HERE / name, directory)
    (directory / "protos").mkdir()
    for contract in PROTOS.glob("*.proto"):
        shutil.copy(contract, directory / "protos")
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=120)
    return directory


def stream(client: Path, address: str, task: str, *files: Path) -> tuple[int, list[dict[str, Any]]]:
    command = ["node", "stream.js", address, str(client), task, *map(str, files)]
    done = subprocess.run(command, cwd=client, capture_output=True, text=True, timeout=90)
    assert not done.stderr, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_node_streams_an_answer(node_client: Path, running_system: RunningSystem) -> None:
    scan = Path(str(get_testdata_file("examples_ybr_color.dcm")))
    returncode, events = stream(node_client, running_system.gateway_address, "report", scan)
    assert returncode == 0, events
    kinds = [next(iter(event)) for event in events]
    assert kinds[:2] == ["metadata", "accepted"]
    assert kinds[-1] == "summary"
    assert set(kinds[2:-1]) == {"text"}
    assert events[0]["metadata"]["x-request-id"] == "from-node"
    assert events[1]["accepted"]["visual_tokens"] > 0
    assert "".join(event["text"] for event in events[2:-1])
    summary = events[-1]["summary"]
    assert summary["request_id"] == "from-node"
    assert 1 <= summary["completion_tokens"] <= 16
    assert summary["finish_reason"] in ("FINISH_REASON_LENGTH", "FINISH_REASON_STOP")
    assert summary["provenance"]["organs"]


def test_node_sees_an_error_with_its_details(node_client: Path, running_system: RunningSystem, tmp_path: Path) -> None:
    text = tmp_path / "letter.txt"
    text.write_text("this is no image")
    returncode, events = stream(node_client, running_system.gateway_address, "report", text)
    assert returncode == 1
    error = events[-1]["error"]
    assert error["code"] == "INVALID_ARGUMENT"
    assert "images[0]" in error["message"]
    assert error["details"] == 1
