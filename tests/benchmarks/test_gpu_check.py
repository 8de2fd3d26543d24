"""The part of `make gpu-check` that needs no GPU: its arithmetic, its table, its options, and a dry run."""

import math
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_packages
from benchmarks.gpu_check import KERNELS, NO_CUDA, Report, arguments_of
from benchmarks.gpu_roofline import Ceilings, Work, measure_ceilings, seconds, work_of
from benchmarks.gpu_table import Row, Shape, markdown, shapes

ROOT = Path(__file__).resolve().parents[2]
H200 = Ceilings(800e12, 4e12)


def test_work_of_a_call() -> None:
    """Three products of 2·F·D each a pair; three matrices of each expert that is used, rows in and out."""
    work = work_of(tokens=2, pairs=3, experts_used=2, hidden=10, inner=7, itemsize=2)
    assert work == Work(flops=3 * 3 * 2 * 7 * 10, bytes_moved=2 * (2 * 3 * 7 * 10 + 2 * 2 * 10))


def test_the_roofline_is_the_later_of_the_two() -> None:
    small = work_of(tokens=1, pairs=2, experts_used=2, hidden=3584, inner=1408, itemsize=2)
    large = work_of(tokens=8192, pairs=16384, experts_used=4, hidden=3584, inner=1408, itemsize=2)
    assert (small.bound(H200), large.bound(H200)) == ("memory", "compute")
    assert small.least_seconds(H200) == pytest.approx(2 * 3 * 2 * 3584 * 1408 / 4e12, rel=1e-3)
    assert large.least_seconds(H200) == 16384 * 6 * 3584 * 1408 / 800e12


def test_ceilings_and_times_are_real_times() -> None:
    found = measure_ceilings("cpu", torch.float32, 64, 2**20)
    assert 1e6 < found.flops_per_s < 1e15
    assert 1e6 < found.bytes_per_s < 1e14
    a = torch.randn(400, 400)
    assert seconds(lambda: (a @ a, a @ a, a @ a, a @ a), "cpu") > 1.5 * seconds(lambda: a @ a, "cpu")


def test_every_combination_is_measured_with_two_experts_a_token_where_there_are() -> None:
    grid = list(shapes((1, 4), (1408, 18944), (1, 8), 3584))
    assert len(grid) == len(set(grid)) == 8
    assert {(shape.experts, shape.top_k) for shape in grid} == {(1, 1), (4, 2)}


def test_the_table() -> None:
    shape = Shape(experts=4, inner=1408, tokens=8, hidden=3584, top_k=2)
    work = Work(flops=10**9, bytes_moved=4 * 10**8)
    rows = [
        Row(shape, "fast", work, seconds=200e-6, graph_seconds=125e-6),
        Row(shape, "auto", work, seconds=220e-6),
        Row(shape, "absent", work, None, note="not installed"),
    ]
    lines = markdown(rows, H200).splitlines()
    assert lines[2] == "| 4 | 1408 | 8 | fast | 200.0 | 125.0 | 8.0 | 3200 | memory | 0.80 | best |"
    assert lines[3] == "| 4 | 1408 | 8 | auto | 220.0 |  | 4.5 | 1818 | memory | 0.45 |  |"
    assert lines[4] == "| 4 | 1408 | 8 | absent | | | | | | | not installed |"
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "- Best kernel at up to 32 tokens: 0.80 of the memory roofline or more (target ≥ 0.7)." in lines
    assert "- `auto` is 10% behind the best at most (target ≤ 5%)." in lines
    assert math.isinf(rows[2].best_seconds)


def test_the_report_is_written_part_by_part(tmp_path: Path) -> None:
    report = Report(tmp_path / "results" / "out.md", "# Head")
    report.add("one", "good", True)
    assert "All parts well so far." in report.path.read_text()
    report.add("two", "bad", False)
    text = report.path.read_text()
    assert "Failed: two." in text
    assert text.index("## one") < text.index("## two")


def test_options() -> None:
    arguments = arguments_of([])
    assert tuple(arguments.tokens) == (1, 8, 32, 128, 512, 2048, 8192)
    assert (tuple(arguments.ffn), tuple(arguments.experts), arguments.hidden) == ((1408, 18944), (1, 4, 8), 3584)
    assert tuple(arguments.kernels) == KERNELS
    with pytest.raises(SystemExit):
        arguments_of(["--parts", "everything"])


def test_carried_packages_are_used_from_where_they_are_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_package.py", "VALUE = 7")
    target = tmp_path / "unpacked"
    assert gpu_packages.unpack(tmp_path, target) == ["carried-1-py3-none-any.whl"]
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; import subprocess\n"
        f"from benchmarks import gpu_packages; gpu_packages.use(Path({str(target)!r}))\n"
        "import carried_package; print(carried_package.VALUE, flush=True)\n"
        "subprocess.run([sys.executable, '-c', 'import carried_package; print(carried_package.VALUE)'], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["7", "7"]


def test_wheels_that_reach_out_of_the_folder_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no wheels in"):
        gpu_packages.unpack(tmp_path, tmp_path / "unpacked")
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as wheel:
        wheel.writestr("../outside.py", "")
    with pytest.raises(ValueError, match="outside the folder"):
        gpu_packages.unpack(tmp_path, tmp_path / "unpacked")
    assert not (tmp_path / "outside.py").exists()


def check(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_check", *options]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_without_a_gpu_it_says_so_and_ends_with_2(tmp_path: Path) -> None:
    done = check("--output", str(tmp_path / "out.md"))
    assert done.returncode == NO_CUDA == 2
    assert "there is no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.md").exists()


def test_a_dry_run_goes_through(tmp_path: Path) -> None:
    output = tmp_path / "out.md"
    sizes = ("--hidden", "64", "--ffn", "64", "--experts", "1", "2", "--tokens", "1", "8")
    done = check("--device", "cpu", *sizes, "--kernels", "reference", "torch_grouped", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    text = output.read_text()
    assert re.search(r"Measured on \d{4}-\d\d-\d\d: .*torch \d", text)
    assert len(re.findall(r"^\| [12] \| 64 \| [18] \| (?:reference|torch_grouped) \| \d", text, re.MULTILINE)) == 8
    assert re.search(r"^\| cpu_packed \| torch\.float32 \| \d\.\de-\d\d \| yes \|  \|$", text, re.MULTILINE)
    assert re.search(r"\d+ skipped", text), "the tests of tests/gpu"


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    output = tmp_path / "out.md"
    sizes = ("--hidden", "64", "--ffn", "64", "--experts", "1", "--tokens", "1", "--kernels", "reference")
    missing = ("--checkpoint", str(tmp_path / "missing"))
    done = check("--device", "cpu", *sizes, *missing, "--parts", "end-to-end", "table", "--output", str(output))
    assert done.returncode == 1
    text = output.read_text()
    assert "Failed: end-to-end." in text
    assert "| 1 | 64 | 1 | reference |" in text
