"""The floor of a decoding step: that its products are those of the model, and a whole run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.checkpoints import CONFIGS
from benchmarks.decode_floor import TITLES
from benchmarks.systems.products import PROCESSES, HalfOfTheProducts, backbone_products
from benchmarks.throughput_table import DECODE_TARGETS
from echovlm_ray.checkpoint.schema import ModelShape
from tests.benchmarks.bench_configs import TINY, write_tiny_configs

ROOT = Path(__file__).resolve().parents[2]
# Not products of rows with a matrix, or far too small to count.
LEFT_OUT = ("embed_tokens", "norm", "bias", "shared_expert_gate", "coefficient", "visual")


@pytest.mark.parametrize("name", ["4_experts", "7_experts"])
def test_the_backbones_products_read_every_weight_of_its_layers_once(name: str) -> None:
    config = json.loads((CONFIGS / f"config_{name}.json").read_text())
    tensors = ModelShape.from_config(config).backbone_tensors()
    of_layers = sum(
        math.prod(shape)
        for tensor, shape in tensors.items()
        if tensor.startswith("model.layers.") and not any(part in tensor for part in LEFT_OUT)
    )
    products = sum(inputs * outputs for inputs, outputs in backbone_products(config))
    assert products * config["num_hidden_layers"] == of_layers
    assert all(outputs % PROCESSES == 0 for _, outputs in backbone_products(config))


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_every_step_ends_after_the_one_before(rows: int) -> None:
    ends = HalfOfTheProducts(TINY | {"torch_dtype": "float32"}).steps(rows, 5)
    assert len(ends) == 5
    assert ends == sorted(set(ends))


def test_a_whole_run(tmp_path: Path) -> None:
    configs = write_tiny_configs(tmp_path)
    command = [sys.executable, "-m", "benchmarks.decode_floor", "--config", "tiny", "--configs", str(configs)]
    command += ["--checkpoints", str(tmp_path), "--dtype", "float32", "--runs", "1", "--new-tokens", "8", "--json"]
    command += ["--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert list(values["tokens_per_s"]) == list(TITLES)
    for of_streams in values["tokens_per_s"].values():
        assert list(of_streams) == [str(streams) for streams in DECODE_TARGETS]
        assert all(0 < rate < 1e7 for rates in of_streams.values() for rate in rates)
    assert json.loads((tmp_path / "decode_floor_tiny_float32.json").read_text()) == values
    text = (tmp_path / "decode_floor_tiny_float32.md").read_text()
    assert text.count("| **1.00** |") == len(DECODE_TARGETS)
