"""The lifecycle benchmark: it detects faults; and a whole run on a small scale."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.lifecycle import ROUNDS, Findings, questions_of, table, write_versions
from benchmarks.lifecycle_callers import TOLERANCE, Question, Tally
from echovlm_ray.checkpoint.demo import make_demo
from echovlm_ray.checkpoint.layout import read_index, registry_root
from experts.bundles.bundle import Bundle
from experts.registry.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    demo = tmp_path_factory.mktemp("lifecycle") / "demo"
    make_demo(demo)
    return Registry(registry_root(demo)).open(read_index(demo).entry("heart").bundle_digest)


def findings(memory: list[int], tally: Tally) -> Findings:
    return Findings(4, 8, tally, memory, 2.0, 3, 3 * MIB)


def test_no_version_can_stand_in_for_another(source: Bundle, tmp_path: Path) -> None:
    bundles = write_versions(Registry(tmp_path / "registry"), source, tmp_path)
    questions = questions_of(bundles)
    assert {question.digest for question in questions} == {bundle.digest for bundle in bundles}
    first, other = questions[0], questions[1]
    assert first.digest != other.digest
    assert first.is_answered_by(first.expected_TD)
    assert not first.is_answered_by(other.expected_TD)


def test_an_output_is_right_up_to_rounding() -> None:
    x_TD = torch.ones(2, 4)
    question = Question.of("0" * 64, 0, x_TD, torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1), 10 * x_TD)
    assert question.is_answered_by(10 * x_TD * (1 + TOLERANCE / 2))
    assert not question.is_answered_by(10 * x_TD * (1 + 2 * TOLERANCE))
    assert not question.is_answered_by(10 * x_TD[:1])
    assert not question.is_answered_by(torch.full((2, 4), torch.nan))


def test_memory_is_compared_after_the_warm_up() -> None:
    warm = [100 * MIB, 200 * MIB, 200 * MIB] + [300 * MIB] * 14
    assert findings(warm, Tally(cycles=32)).growth == 0
    rising = [100 * MIB, *(100 * MIB + place * MIB for place in range(ROUNDS))]
    assert findings(rising, Tally(cycles=32)).growth == pytest.approx((114 - 103) / 103, abs=0.01)


@pytest.mark.parametrize("fault", [{"wrong": 1}, {"unequal": 1}, {"failures": ["an exchange: broken"]}, {"cycles": 31}])
def test_every_fault_counts(fault: dict[str, object]) -> None:
    sound = {"cycles": 32, "outputs": 64}
    assert findings([MIB] * 17, Tally(**sound)).ok  # type: ignore[arg-type]
    assert not findings([MIB] * 17, Tally(**{**sound, **fault})).ok  # type: ignore[arg-type]


def test_a_whole_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.lifecycle", "--threads", "6", "--cycles", "8", "--json"]
    done = subprocess.run([*command, "--output", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    # 1 only says that memory grew: so few cycles are all warm-up.
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    assert (found["cycles"], found["wrong"], found["unequal"], found["failures"]) == (48, 0, 0, [])
    assert found["outputs"] >= 96
    assert len(found["memory_bytes"]) == 9
    assert found["longest_s"].keys() == {"load", "unload", "exchanges"}
    text = (tmp_path / "lifecycle.md").read_text()
    assert "| cycles that came to their end | 48 | 48 |" in text
    assert (tmp_path / "lifecycle.png").stat().st_size > 1000
    assert json.loads((tmp_path / "lifecycle.json").read_text())["cycles"] == 48


def test_the_table_names_every_refusal() -> None:
    tally = Tally(cycles=32, outputs=64, longest_s={"load": 0.25})
    tally.refusals["no room for a load"] = 1234
    lines = table(findings([MIB] * 17, tally))
    assert "| refused, and rightly so: no room for a load | 1,234 |  |" in lines
    assert "| longest call, ms | load 250 |  |" in lines
