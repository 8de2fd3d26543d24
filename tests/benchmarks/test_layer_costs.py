"""The instruments of `benchmarks.layer_costs` on a tiny model: a running engine, and real expert processes."""

import json
import statistics
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.checkpoints import BenchCheckpoint, bench_checkpoint
from benchmarks.host_costs import measure_exchange, measure_products, measure_shared_products, measure_software
from benchmarks.layer_costs import OTHER, Cost, cases, cost_of, main, markdown, measure
from benchmarks.measured_engine import MeasuredEngine, measured_engine
from benchmarks.step_timeline import (
    HEAD,
    KERNEL,
    LAYER,
    LAYER_PARTS,
    Span,
    Step,
    Timeline,
    TimelineStopwatch,
    timeline_of,
)
from benchmarks.workload import random_workload
from tests.benchmarks.bench_configs import TINY, write_tiny_configs

LAYERS = TINY["num_hidden_layers"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> BenchCheckpoint:
    configs = write_tiny_configs(tmp_path_factory.mktemp("configs"))
    return bench_checkpoint("tiny", "float32", configs=configs, folder=tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def in_process(checkpoint: BenchCheckpoint) -> Iterator[MeasuredEngine]:
    with measured_engine(checkpoint.split, "in process") as measured:
        yield measured


@pytest.fixture(scope="module")
def remote(checkpoint: BenchCheckpoint) -> Iterator[MeasuredEngine]:
    with measured_engine(checkpoint.split, "remote", organs=checkpoint.organs[:1]) as measured:
        yield measured


def steps_of(measured: MeasuredEngine, checkpoint: BenchCheckpoint, streams: int, organs: int) -> list[Step]:
    workload = random_workload(
        streams, prompt_tokens=20, new_tokens=12, vocab_size=8192, organs=checkpoint.organs[:organs], seed="test"
    )
    with timeline_of(measured.engine) as timeline:
        measured.run(workload)
        return timeline.steps()


def test_every_step_is_seen_with_all_its_parts(in_process: MeasuredEngine, checkpoint: BenchCheckpoint) -> None:
    steps = steps_of(in_process, checkpoint, 3, 2)
    decoding = [step for step in steps if step.rows == (1, 1, 1)]
    # The first token comes with the prompt, and the last step has no end.
    assert 8 <= len(decoding) <= 11
    assert sum(sum(step.rows) for step in steps) >= 60
    for earlier, later in pairwise(steps):
        assert earlier.end == later.start
    shares = []
    for step in decoding:
        names = [span.name for span in step.spans]
        # A layer is begun and finished, and there is an exchange for each of two organs.
        assert names.count(LAYER) == names.count("gather") == names.count("send") == 2 * LAYERS
        for part in ("attention", "dense and shared"):
            assert names.count(part) == LAYERS
        assert names.count(HEAD) == 1
        assert all(step.start <= span.start <= span.end <= step.end for span in step.spans)
        totals = step.totals()
        inside = sum(totals[part] for part in LAYER_PARTS) + totals[KERNEL]
        assert inside <= totals[LAYER]
        shares.append(inside / totals[LAYER])
        assert step.computed - step.start > totals[LAYER] + totals[HEAD]
    assert statistics.median(shares) > 0.3


def test_afterwards_the_engine_is_as_it_was(in_process: MeasuredEngine, checkpoint: BenchCheckpoint) -> None:
    engine = in_process.engine
    before = set(vars(engine)), set(vars(engine._runner))
    steps_of(in_process, checkpoint, 1, 1)
    assert (set(vars(engine)), set(vars(engine._runner))) == before
    assert engine._runner.dispatcher.stopwatch is None
    for module in engine._runner.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "begin" not in vars(module)


def test_gathering_lies_before_sending() -> None:
    timeline = Timeline()
    stopwatch = TimelineStopwatch(timeline)
    stopwatch.add("gather", 1.0)
    stopwatch.add("send", 2.0)
    gather, send = timeline.spans
    assert (gather.name, send.name) == ("gather", "send")
    assert gather.end == send.start
    assert (gather.seconds, send.seconds) == pytest.approx((1.0, 2.0))
    assert stopwatch.totals()["gather"] == (1, 1.0)


@given(st.lists(st.floats(0.001, 1.0), min_size=len(LAYER_PARTS) + 1, max_size=len(LAYER_PARTS) + 1), st.booleans())
def test_parts_add_up_to_the_layer(seconds: list[float], in_process: bool) -> None:
    *parts, rest = seconds
    spans = [Span(name, 0.0, value) for name, value in zip(LAYER_PARTS, parts, strict=True)]
    spans += [Span(KERNEL, 0.0, 0.5), Span(HEAD, 0.0, 0.25)]
    layer_s = sum(parts) + rest + (0.5 if in_process else 0.0)
    spans.append(Span(LAYER, 0.0, layer_s))
    step = Step((1,), 0.0, 20.0, 30.0, tuple(spans))
    step_s, head_s, one_layer_s, found = cost_of([step, step], 2, in_process=in_process)
    assert (step_s, head_s, one_layer_s) == pytest.approx((30.0, 0.25, layer_s / 2))
    assert found[OTHER] == pytest.approx(rest / 2)
    shown = [value for name, value in found.items() if in_process or name != KERNEL]
    assert sum(shown) == pytest.approx(one_layer_s)


def test_a_line_of_decoding_and_one_of_prefill(in_process: MeasuredEngine, checkpoint: BenchCheckpoint) -> None:
    decode = measure(in_process, checkpoint, "in process", ("decode", 7, 8), 8)
    prefill = measure(in_process, checkpoint, "in process", ("prefill", 1, 100), 8)
    assert (decode.label, prefill.label) == ("decode, batch 8, 7 organs", "prefill, 100 tokens")
    for cost in (decode, prefill):
        assert 0 < LAYERS * cost.layer_s + cost.head_s < cost.step_s
        assert cost.parts[KERNEL] > 0
        assert cost.tokens_per_s > 0
    assert 0.2 < decode.tokens_per_s * decode.step_s / 8 < 5


def test_an_expert_process_tells_when_it_was_busy(remote: MeasuredEngine, checkpoint: BenchCheckpoint) -> None:
    (process,) = remote.processes
    process.busy()
    decoding = [step for step in steps_of(remote, checkpoint, 2, 1) if step.rows == (1, 1)]
    busy = process.busy()
    assert process.busy() == []
    for step in decoding:
        inside = [ended - began for began, ended in busy if step.start <= began <= ended <= step.end]
        assert len(inside) == LAYERS
        # The exchange's own figure has the checks of the group in it as well.
        assert 0 < sum(inside) <= step.totals()[KERNEL]
        # Elsewhere, so no part of the layer's time.
        assert sum(step.totals()[part] for part in LAYER_PARTS) <= step.totals()[LAYER]


def test_an_expert_process_that_cannot_start_is_told(checkpoint: BenchCheckpoint) -> None:
    with (
        pytest.raises(RuntimeError, match="the expert process of missing ended with 1"),
        measured_engine(checkpoint.split, "remote", organs=("missing",)),
    ):
        pass


def test_costs_of_the_machine(in_process: MeasuredEngine, remote: MeasuredEngine) -> None:
    software, exchange = measure_software(in_process), measure_exchange(remote)
    assert min(software.layer_s, software.sequence_s, software.step_s, software.kernel_s) >= 0
    assert 0 < exchange.send_s < exchange.round_trip_s
    assert exchange.bytes_per_s > 0


def test_rates_of_products() -> None:
    rates = measure_products(torch.float32)
    assert min(rates.bytes_per_s, rates.flops_per_s) > 0
    assert measure_shared_products(torch.float32).bytes_per_s > 0


def test_cases() -> None:
    assert list(cases((1, 8), 7)) == [("decode", 1, 1), ("decode", 1, 8), ("decode", 7, 8), ("prefill", 1, 512)]
    assert list(cases((1, 8), 1)) == [("decode", 1, 1), ("decode", 1, 8), ("prefill", 1, 512)]


def test_the_script(
    checkpoint: BenchCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    demo_checkpoint: Path,
) -> None:
    folder = checkpoint.split.parent.parent
    options = ["--config", "tiny", "--dtype", "float32", "--batches", "1", "4", "--organs", "1", "--new-tokens", "6"]
    options += ["--configs", str(write_tiny_configs(tmp_path)), "--checkpoints", str(folder)]
    options += ["--demo", str(demo_checkpoint), "--output", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", ["layer_costs", *options])
    main()
    result = json.loads((tmp_path / "results/layer_costs.json").read_text())
    costs = [Cost(**cost) for cost in result["costs"]]
    assert [(cost.placement, cost.rows) for cost in costs] == [
        (placement, rows) for placement in ("remote", "in process") for rows in (1, 4, 512)
    ]
    assert result["config"]["hidden_size"] == TINY["hidden_size"]
    text = (tmp_path / "results/layer_costs.md").read_text()
    assert text == markdown(costs, result)
    assert text.count("| decode, batch 4 |") == 2
    assert (tmp_path / "results/layer_costs.png").read_bytes().startswith(b"\x89PNG")
