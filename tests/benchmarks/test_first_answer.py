"""The benchmark of start and memory: what it reads, and the ratios that it reports."""

import subprocess
import sys

import psutil
import pytest

from benchmarks.first_answer import Measured, report
from benchmarks.import_profile import ImportProfile, read_profile
from benchmarks.process_memory import ProcessMemory, memory_below

MIB = 1024 * 1024


def test_a_profile_adds_up_what_modules_took_themselves() -> None:
    code = "import email.message, json.tool"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    found = read_profile(done.stderr + "a line of the log | 12 | 13\n")
    assert {"email", "json"} <= found.packages.keys()
    assert found.modules == done.stderr.count("\n") - 1
    assert found.seconds == pytest.approx(sum(found.packages.values()))
    assert list(found.packages.values()) == sorted(found.packages.values(), reverse=True)


def test_every_process_below_one_is_measured_and_named() -> None:
    code = """
import subprocess, sys
bare = [sys.executable, "-c", "import sys; sys.stdin.read()"]
children = [subprocess.Popen([*bare, title], stdin=subprocess.PIPE) for title in ("raylet/" + "raylet", "other")]
print("started", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = memory_below(process.pid, "command")
        below = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        process.kill()
    assert {each.pid for each in found} == below | {process.pid}
    assert sorted(each.kind for each in found) == ["command", "command", "raylet"]
    assert all(0 < each.proportional <= each.resident for each in found)


def test_the_page_compares_with_the_floor() -> None:
    def system(ready_s: float, expert: int, gateway: int) -> Measured:
        kinds = {"expert-heart": expert, "expert-liver": expert, "gateway": gateway}
        return Measured(ready_s, [ProcessMemory(kind, 1, 2 * size * MIB, size * MIB) for kind, size in kinds.items()])

    profiles = {"gateway": ImportProfile(12, 0.5, {"numpy": 0.3, "grpc": 0.2})}
    page = report([system(30.0, 220, 100), system(40.0, 220, 100)], [system(20.0, 200, 200)] * 2, profiles)
    assert "| 35.0 | 20.0 | 1.75 | ≤ 1.3 |" in page
    assert "| an expert group, resident MiB | 440 | 400 | 1.10 | ≤ 1.1 |" in page
    assert "| the whole system, proportional GB | 0.57 | 0.63 | 0.90 | ≤ 3.2 GB |" in page
    assert "| gateway | 200 | 100 | 200 |" in page
    assert "| gateway | 12 | 0.5 | numpy 0.30, grpc 0.20 |" in page
