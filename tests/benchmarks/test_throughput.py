"""The throughput benchmark: its arithmetic on times that are known, and a whole run of all three systems."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.checkpoints import BenchCheckpoint, bench_checkpoint
from benchmarks.systems.protocol import MeasuredSystem, SystemFailedError
from benchmarks.throughput import Plan
from benchmarks.throughput_table import Cell, System, cell_table, ratio_table, ratios
from benchmarks.timings import Timings
from benchmarks.workload import Workload, random_workload
from echovlm_ray.checkpoint.layout import ORGANS
from tests.benchmarks.bench_configs import write_tiny_configs

ROOT = Path(__file__).resolve().parents[2]
# Two streams: the second was submitted half a second later, and waited longer.
TWO_STREAMS = Timings(prompt_tokens=300, submitted=(0.0, 0.5), tokens=((1.0, 2.0, 3.0, 4.0), (2.5, 3.0, 3.5, 6.0)))


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_configs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(tiny_directory: Path) -> BenchCheckpoint:
    return bench_checkpoint("tiny", "float32", configs=tiny_directory, folder=tiny_directory)


def test_what_follows_from_the_times() -> None:
    assert TWO_STREAMS.time_to_first_token == [1.0, 2.0]
    assert TWO_STREAMS.inter_token_latency == [1.0, 1.0, 1.0, 0.5, 0.5, 2.5]
    assert TWO_STREAMS.prefill_tokens_per_s == 300 / 2.5
    # Both decode from 2.5 to 4: tokens at 3 and 4, and at 3 and 3.5.
    assert TWO_STREAMS.decode_tokens_per_s == 4 / 1.5
    assert TWO_STREAMS.tokens_per_s == 8 / 6.0


def test_streams_that_never_decode_together_have_no_decode_throughput() -> None:
    apart = Timings(2, (0.0, 0.0), ((1.0, 2.0), (3.0, 4.0)))
    with pytest.raises(ValueError, match="--new-tokens"):
        _ = apart.decode_tokens_per_s


@given(
    streams=st.integers(1, 5),
    steps=st.integers(2, 20),
    first=st.floats(0.1, 5.0),
    step=st.floats(0.01, 1.0),
)
def test_a_batch_in_step_makes_a_token_for_each_stream_and_step(
    streams: int, steps: int, first: float, step: float
) -> None:
    times = tuple(first + index * step for index in range(steps))
    timings = Timings(10 * streams, (0.0,) * streams, (times,) * streams)
    assert timings.decode_tokens_per_s == pytest.approx(streams / step)
    assert Timings.from_json(json.loads(json.dumps(timings.to_json()))) == timings


def test_prompts_differ_and_repeat_with_the_seed() -> None:
    def make(seed: str) -> Workload:
        return random_workload(16, prompt_tokens=20, new_tokens=3, vocab_size=1000, organs=ORGANS, seed=seed)

    one = make("1")
    assert one == make("1") == Workload.from_json(json.loads(json.dumps(one.to_json())))
    assert len({*one.prompts, *make("2").prompts}) == 32
    assert one.organs[:8] == (*ORGANS, ORGANS[0])
    assert one.prompt_tokens == 16 * 20
    assert all(300 <= token < 900 for prompt in one.prompts for token in prompt)


def test_a_plan_gives_no_prompt_twice(tiny: BenchCheckpoint) -> None:
    plan = Plan((System("engine", 1),), (1, 4), runs=2, prompt_tokens=32, new_tokens=8, spread=False)
    workloads = [plan.warm_up(tiny, streams) for streams in plan.streams]
    workloads += [plan.workload(tiny, streams, run) for streams in plan.streams for run in (1, 2)]
    prompts = [prompt for workload in workloads for prompt in workload.prompts]
    assert len(set(prompts)) == len(prompts) == 15
    assert {organ for workload in workloads for organ in workload.organs} == {ORGANS[0]}


def test_systems_are_named_with_their_threads() -> None:
    assert [System.parse(text) for text in ("served", "engine:2", " generate ")] == [
        System("served", 1),
        System("engine", 2),
        System("generate", 2),
    ]
    for wrong in ("", "served:", "served:0", "served:two", "vllm"):
        with pytest.raises(ValueError, match="is no system"):
            System.parse(wrong)


def constant(streams: int, step: float, firsts: tuple[float, ...] | None = None) -> Timings:
    firsts = firsts or (1.0,) * streams
    tokens = tuple(tuple(first + step * index for index in range(200)) for first in firsts)
    return Timings(streams, (0.0,) * streams, tokens)


def test_ratios_are_taken_within_each_run_and_judged() -> None:
    served, engine, generate = System.parse("served"), System.parse("engine"), System.parse("generate")
    cells = [
        # The machine was half as fast in the second run, for both alike.
        Cell(served, 1, [constant(1, 0.01), constant(1, 0.02)]),
        Cell(generate, 1, [constant(1, 0.02), constant(1, 0.04)]),
        Cell(served, 8, [constant(8, 0.02)]),
        Cell(engine, 8, [constant(8, 0.01)]),
        Cell(served, 32, [constant(32, 0.01, tuple(float(index + 1) for index in range(32)))]),
        Cell(engine, 32, [constant(32, 0.01)]),
    ]
    cells[4].runs[0] = Timings(32, (0.0,) * 32, tuple((float(index + 1), 40.0, 41.0) for index in range(32)))
    found = {ratio.measure: ratio for ratio in ratios(cells)}
    decode, in_process, first_token = found.values()
    assert decode.measure == "served system, 1 thread ÷ plain `generate`, 2 threads: decode, 1 stream"
    assert decode.values == pytest.approx((2.0, 2.0))
    assert (decode.target, decode.met) == (1.6, True)
    assert in_process.values == pytest.approx((0.5,))
    assert (in_process.target, in_process.met) == (0.95, False)
    assert first_token.value == pytest.approx((1 + 0.99 * 31) / 16.5)
    assert (first_token.target, first_token.met) == (3.0, True)
    verdicts = [line.split("|")[-2].strip() for line in ratio_table(list(found.values()))[2:]]
    assert verdicts == ["met", "**missed**", "met"]
    assert len(cell_table(cells)) == 2 + len(cells)


def child(directory: Path, run: str) -> list[str]:
    """A program that speaks the protocol around one line of code."""
    program = directory / "program.py"
    program.write_text(
        "from contextlib import nullcontext\n"
        "from benchmarks.systems.protocol import serve_workloads\n"
        "from benchmarks.timings import Timings\n"
        f"serve_workloads(lambda: nullcontext(lambda workload: {run}))\n"
    )
    return [str(program)]


def test_what_libraries_print_is_no_answer(tmp_path: Path) -> None:
    run = "print('this too') or Timings(1, (0.0,), ((1.0, 2.0),))"
    with MeasuredSystem(child(tmp_path, run), {"PYTHONPATH": str(ROOT)}) as system:
        assert system.wait_until_ready() == {"ready": True}
        assert system.run(Workload(((1,),), ("",), 2)) == Timings(1, (0.0,), ((1.0, 2.0),))


@pytest.mark.parametrize(
    ("run", "reason"), [("Timings(1, (0.0,), ((1.0,),))", "did not make 2 tokens"), ("1 / 0", "division by zero")]
)
def test_a_system_that_fails_says_why(run: str, reason: str, tmp_path: Path) -> None:
    with MeasuredSystem(child(tmp_path, run), {"PYTHONPATH": str(ROOT)}) as system:
        system.wait_until_ready()
        with pytest.raises(SystemFailedError, match=reason):
            system.run(Workload(((1,),), ("",), 2))


def test_a_whole_run(tiny_directory: Path, tiny: BenchCheckpoint, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.throughput", "--config", "tiny", "--configs", str(tiny_directory)]
    command += ["--checkpoints", str(tiny_directory), "--concurrency", "1,3", "--runs", "1", "--spread", "--json"]
    command += ["--prompt-tokens", "8", "--new-tokens", "6", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert [(cell["system"], cell["streams"]) for cell in values["cells"]] == [
        (system, streams) for system in ("served", "engine", "generate") for streams in (1, 3)
    ]
    for cell in values["cells"]:
        assert 0 < cell["decode_tokens_per_s"][0] < 1e5
        assert 0 < cell["inter_token_ms"]["p50"] <= cell["inter_token_ms"]["p99"]
    assert [target["measure"] for target in values["targets"]] == [
        "served system, 1 thread ÷ plain `generate`, 2 threads: decode, 1 stream"
    ]
    assert json.loads((tmp_path / "throughput_tiny_float32_spread.json").read_text()) == values
    text = (tmp_path / "throughput_tiny_float32_spread.md").read_text()
    assert "| target |" in text
    assert "spread over the organs" in text
    assert (tmp_path / "throughput_tiny_float32_spread.png").read_bytes().startswith(b"\x89PNG")
