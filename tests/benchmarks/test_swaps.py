import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.swap_operations import Swap
from benchmarks.swap_report import Findings, plot, table
from benchmarks.swap_streams import Asked, Heard
from benchmarks.timings import nearest_rank

ROOT = Path(__file__).resolve().parents[2]


def heard(began: float, pause: float, *, version: str = "1.0.0", text: str = "abc") -> Heard:
    times = tuple(began + number * pause for number in range(4))
    return Heard(Asked("heart", "?", 4), version, text, began, times, times[-1])


@pytest.fixture
def found() -> Findings:
    phases = {"verify": (10.0, 11.0), "switch": (11.0, 12.0)}
    swap = Swap("promote", 10.0, 12.0, phases, decided=11.0, returned=11.3, replaced="1.0.0", served_s=0.03)
    return Findings(
        organ="heart",
        heard=[heard(1.0, 0.1), heard(10.1, 0.2), heard(13.0, 0.1, version="2.0.0", text="xyz")],
        failures=["heart: it broke"],
        alone={("heart", "1.0.0", "?"): "abc", ("heart", "2.0.0", "?"): "other"},
        swaps=[swap],
        quiet=[(0.0, 9.0)],
        memory={"router": [100, 102, 104]},
        bundle_bytes=1024 * 1024,
        read_s=[0.02],
    )


def test_answers_are_held_against_those_of_their_own_version(found: Findings) -> None:
    assert found.mismatches == 1


def test_pauses_are_told_apart_by_whether_a_swap_went_on(found: Findings) -> None:
    assert found.gaps_without_ms == pytest.approx([100.0] * 3)
    assert found.gaps_during_ms == pytest.approx([200.0] * 3)
    assert found.gap_ratio == pytest.approx(2.0)


def test_requests_on_the_version_before_are_counted_from_the_decision_and_from_the_return(found: Findings) -> None:
    assert (found.last_old_s, found.old_after_return) == ([0.0], 0)
    late = replace(found, heard=[*found.heard, heard(11.2, 0.1), heard(11.4, 0.1), heard(11.5, 0.1, version="2.0.0")])
    assert late.last_old_s == pytest.approx([0.4])
    assert late.old_after_return == 1
    assert replace(late, organ="liver").old_after_return == 0


def test_memory_is_compared_with_what_it_was_after_the_warm_up(found: Findings) -> None:
    assert found.growth("router") == pytest.approx(104 / 102 - 1)


def test_percentiles_are_values_that_were_measured() -> None:
    assert [nearest_rank([3.0, 1.0, 2.0], percent) for percent in (0, 50, 99)] == [1.0, 2.0, 3.0]


def test_the_table_has_values_beside_their_targets(found: Findings) -> None:
    text = "\n".join(table(found))
    assert "| failed requests, of 4 | 1 | 0 |" in text
    assert "200.0 ÷ 100.0 = 2.00 | ≤ 1.2 |" in text
    assert "1.50, 1.50 | ≤ 1.5 |" in text
    json.dumps(found.to_json())


def test_the_plot_is_drawn(found: Findings, tmp_path: Path) -> None:
    plot(found, "two", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_few_swaps_of_a_real_system(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.swaps", "--swaps", "4", "--streams", "2", "--new-tokens", "8"]
    done = subprocess.run(
        [*command, "--settle", "1", "--json", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert numbers["swaps"] == {"promote": 1, "roll back": 1, "canary, promote": 1, "canary, roll back": 1}
    assert (numbers["failures"], numbers["mismatches"]) == ([], 0)
    assert (tmp_path / "swaps_demo.md").is_file()
