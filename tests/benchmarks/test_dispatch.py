import json
import os
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from benchmarks import dispatch
from benchmarks.dispatch import FLOOR, SHARED, WAYS, Measured, as_json, markdown, measure, plot


@pytest.fixture
def found() -> list[Measured]:
    times = {way: [float(number * (place + 1)) for number in range(1, 101)] for place, way in enumerate(reversed(WAYS))}
    return [Measured(place, size, times) for place in dispatch.PLACES for size in dispatch.SIZES]


def test_all_ways_are_measured_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "SIZES", {"8 KiB": 8 * 1024, "64 KiB": 64 * 1024})
    cores = os.sched_getaffinity(0)
    with Progress(console=Console(quiet=True)) as progress:
        found = measure("apart", 25, progress)
    assert os.sched_getaffinity(0) == cores
    if len(cores) < 2:
        assert not found
        return
    assert [row.size for row in found] == ["8 KiB", "64 KiB"]
    for row in found:
        assert {way: len(times) for way, times in row.microseconds.items()} == dict.fromkeys(WAYS, 25)
        assert all(0 < time < 1e6 for times in row.microseconds.values() for time in times)


def test_the_table_has_percentiles_ratios_and_verdicts(found: list[Measured]) -> None:
    row = found[1]
    assert row.percentile(FLOOR, 50) == 51
    assert row.percentile(SHARED, 99) == 400
    assert row.ratio(SHARED) == 4
    text = markdown(found, (0.25, 1.5))
    assert "| 64 KiB | 204 | 400 |" in text
    assert text.count("≤ 2.5: **missed**") == text.count("≤ 1.3: **missed**") == 1
    assert "before and after: 0.2 and 1.5" in text
    assert "dispatch.png" in text


def test_programs_get_the_same_numbers(found: list[Measured]) -> None:
    rows = json.loads(as_json(found))
    assert len(rows) == len(found)
    assert rows[1][SHARED] == {"p50_us": 204.0, "p99_us": 400.0, "ratio": 4.0}


def test_the_plot_is_drawn(found: list[Measured], tmp_path: Path) -> None:
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
