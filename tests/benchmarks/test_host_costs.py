"""What the scaling model is given, measured on tiny models: running engines, and real expert processes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks.checkpoints import CONFIGS, BenchCheckpoint
from benchmarks.host_costs import (
    CASES,
    FEW_LAYERS,
    LONG,
    MANY_LAYERS,
    DecodingCase,
    SoftwareCosts,
    measure_exchange,
    measure_products,
    measure_shared_products,
    measure_software,
    small_models,
    software_costs,
)
from benchmarks.measured_engine import measured_engine
from benchmarks.scaling_predictions import check
from tests.benchmarks.bench_configs import TINY, write_tiny_configs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def small() -> Iterator[dict[int, BenchCheckpoint]]:
    with small_models("float32", CONFIGS) as found:
        yield found


def test_the_small_models_differ_in_their_layers_alone(small: dict[int, BenchCheckpoint]) -> None:
    few, many = (dict(small[layers].config) for layers in (FEW_LAYERS, MANY_LAYERS))
    assert (few.pop("num_hidden_layers"), many.pop("num_hidden_layers")) == (FEW_LAYERS, MANY_LAYERS)
    assert few == many


def test_the_costs_are_found_in_the_times_that_they_make() -> None:
    costs = SoftwareCosts(3e-4, 2e-5, 5e-4, 4e-5, 4e-5, 5e-5, 8e9)
    cached_bytes = 256

    def step_s(layers: int, case: DecodingCase) -> float:
        # The others' reading is a part of what a sequence costs.
        read_s = (case == LONG) * case.streams * (LONG.prompt_tokens - 32) * cached_bytes / costs.cache_bytes_per_s
        exchanges_s = case.organs * (costs.gate_s + costs.kernel_s)
        layer_s = costs.layer_s + (case.streams - 1) * costs.sequence_s + exchanges_s + read_s
        return costs.step_s + case.streams * costs.token_s + layers * layer_s

    seconds = {(layers, case): step_s(layers, case) for layers in (FEW_LAYERS, MANY_LAYERS) for case in CASES}
    assert asdict(software_costs(seconds, costs.kernel_s, cached_bytes)) == pytest.approx(asdict(costs))


def test_costs_of_the_machine(small: dict[int, BenchCheckpoint]) -> None:
    few, many = small[FEW_LAYERS], small[MANY_LAYERS]
    with measured_engine(few.split, "in process") as fewer, measured_engine(many.split, "in process") as more:
        software = measure_software({FEW_LAYERS: fewer, MANY_LAYERS: more}, runs=1)
    assert min(software.layer_s, software.kernel_s) > 0
    with measured_engine(few.split, "remote", organs=few.organs[:1]) as remote:
        exchange = measure_exchange(remote)
    assert 0 < exchange.send_s < exchange.round_trip_s
    assert exchange.bytes_per_s > 0


def test_rates_of_products() -> None:
    rates = measure_products(torch.float32)
    assert min(rates.bytes_per_s, rates.flops_per_s) > 0
    assert measure_shared_products(torch.float32).bytes_per_s > 0


def test_an_expert_process_that_cannot_start_is_told(small: dict[int, BenchCheckpoint]) -> None:
    with (
        pytest.raises(RuntimeError, match="the expert process of missing ended with 1"),
        measured_engine(small[FEW_LAYERS].split, "remote", organs=("missing",)),
    ):
        pass


def test_the_script(tmp_path: Path) -> None:
    options = ["--dtype", "float32", "--batches", "1", "4", "--organs", "2", "--new-tokens", "6", "--runs", "1"]
    options += ["--config", "tiny", "--checkpoints", str(tmp_path / "bench"), "--output", str(tmp_path)]
    configs = write_tiny_configs(tmp_path)
    (configs / "config_4_experts.json").write_bytes((CONFIGS / "config_4_experts.json").read_bytes())
    # A process of its own, because the script begins again with a router's environment.
    command = [sys.executable, "-m", "benchmarks.host_costs", *options, "--configs", str(configs)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240)
    result = json.loads((tmp_path / "host_costs.json").read_text())
    assert result["config"]["hidden_size"] == TINY["hidden_size"]
    lines = ((1, 1), (1, 4), (2, 4))
    assert [(found.placement, found.organs, found.batch) for found in check(result)] == [
        (placement, *line) for placement in ("remote", "in process") for line in lines
    ]
