"""The benchmark of evaluations runs against a gateway, and reports its measurement."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running_system import RunningSystem

ROOT = Path(__file__).resolve().parents[2]


def test_a_short_run(running_system: RunningSystem, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.evaluation", "--server", running_system.gateway_address, "--json"]
    line += ["--records", "2", "--new-tokens", "4", "--runs", "1", "--output", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["questions"] == 6
    (one,), (many,) = values["seconds"].values()
    assert values["ratio"] == pytest.approx(one / many)
    assert "8 at once ÷ one at a time" in (tmp_path / "evaluation.md").read_text()


def test_a_server_that_is_away_is_named(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.evaluation", "--server", "127.0.0.1:1", "--output", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "the system failed" in done.stderr
    assert "Traceback" not in done.stderr
