"""The decode profile: its arithmetic, and the script on a tiny model with a real expert process."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.checkpoints import bench_checkpoint
from benchmarks.decode_profile import (
    ACTIVITIES,
    DELIVERY,
    OTHER_INSIDE,
    OTHER_OUTSIDE,
    activities_of,
    during,
    main,
    union_seconds,
)
from benchmarks.step_timeline import COMMIT, HEAD, KERNEL, LAYER, LAYER_PARTS, SAMPLING, SCHEDULING, Span, Step
from tests.benchmarks.bench_configs import write_tiny_configs

spans = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)).map(lambda pair: (pair[0], pair[0] + pair[1])))


def test_activities_add_up_to_the_step() -> None:
    parts = [Span(name, 0.0, float(index + 1)) for index, name in enumerate(LAYER_PARTS)]
    rest = [Span(LAYER, 0.0, 40.0), Span(KERNEL, 0.0, 9.0), Span(HEAD, 0.0, 5.0)]
    rest += [Span(COMMIT, 0.0, 3.0), Span(SAMPLING, 0.0, 2.0), Span(SCHEDULING, 0.0, 1.0)]
    found = activities_of(Step((1,), 0.0, 50.0, 60.0, tuple(parts + rest)))
    assert set(found) == set(ACTIVITIES)
    assert sum(found.values()) == pytest.approx(60.0)
    assert found[OTHER_INSIDE] == 40.0 - sum(range(1, len(LAYER_PARTS) + 1))
    assert (found[DELIVERY], found[OTHER_OUTSIDE]) == (1.0, 60.0 - 40.0 - 5.0 - 3.0 - 1.0)


@given(spans)
def test_union_counts_every_moment_once(given_spans: list[tuple[float, float]]) -> None:
    moments = {moment for began, ended in given_spans for moment in range(int(began), int(ended))}
    assert union_seconds(given_spans) == len(moments)


def test_busy_times_of_a_step() -> None:
    step = Step((1,), 10.0, 15.0, 20.0, ())
    assert during(step, [(8.0, 9.0), (9.0, 11.0), (12.0, 13.0), (19.0, 21.0)]) == [(10.0, 11.0), (12.0, 13.0)]


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs, folder = write_tiny_configs(tmp_path), tmp_path / "bench"
    bench_checkpoint("tiny", "bfloat16", configs=configs, folder=folder)
    options = ["--config", "tiny", "--dtype", "bfloat16", "--organs", "1", "--new-tokens", "12"]
    options += ["--configs", str(configs), "--checkpoints", str(folder), "--output", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", ["decode_profile", *options])
    main()
    text = (tmp_path / "results/decode_profile_bfloat16.md").read_text()
    assert "batch 1, ms | % | batch 8, ms | %" in text
    rows = {
        match[1]: [float(cell) for cell in match[2].split("|")]
        for match in re.finditer(r"^\| ([^|]+) \| ([\d. |-]+) \|$", text, re.MULTILINE)
    }
    for case in (0, 2):
        steps_ms = rows["**a step**"][case]
        assert sum(rows[name][case] for name in ACTIVITIES) == pytest.approx(steps_ms, rel=0.5)
        assert 0 < rows["the packed products by themselves, head included"][case] < steps_ms
        assert 0 < rows["an expert process computes"][case] <= rows["all of them, added up"][case] + 0.01 < steps_ms
    assert (tmp_path / "results/decode_profile_bfloat16.png").read_bytes().startswith(b"\x89PNG")
