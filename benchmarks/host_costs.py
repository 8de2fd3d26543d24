"""What the scaling model is given of a machine: how fast products run, and what the software around them costs.

Both are measured apart from what the model then predicts: products in a size of their own, and the software on the
demo, whose products take next to no time. Run as a program it multiplies until its standard input is closed, to be
the other process that takes its share of the memory's bandwidth.
"""

import argparse
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measured_engine import MeasuredEngine
from benchmarks.step_timeline import KERNEL, LAYER, Step, median_totals, timeline_of
from benchmarks.workload import random_workload
from experts.kernels.packed_linear import PackedLinear

ROOT = Path(__file__).resolve().parent.parent
# A layer's product and how many different ones: more than a processor's cache together.
PRODUCT_SHAPE = (2816, 1024)
PRODUCT_BYTES = 192 * 2**20
ROWS = 32
REPETITIONS = 20
# Tokens of the exchanges by which latency and bandwidth are distinguished.
FEW_TOKENS, MANY_TOKENS = 1, 2048
EXCHANGES = 50
STREAMS = 8
NEW_TOKENS = 48
SHORT_PROMPT, LONG_PROMPT = 32, 480


@dataclass(frozen=True, slots=True)
class ProductRates:
    """How fast one thread multiplies by packed weights; see `measure_products`."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class SoftwareCosts:
    """Seconds of the router's software without matrix products and kernels; see `benchmarks.scaling_system.Software`.

    Attributes:
        kernel_s: of one call of an expert group, whose products take next to no time.
        cache_bytes_per_s: at which attention reads keys and values.
    """

    layer_s: float
    sequence_s: float
    step_s: float
    token_s: float
    gate_s: float
    kernel_s: float
    cache_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class ExchangeCosts:
    """The way to an expert process and back.

    Attributes:
        send_s: of the router, to send one exchange.
        round_trip_s: of one token's exchange, without the kernel.
        bytes_per_s: of more tokens, counted in both directions.
    """

    send_s: float
    round_trip_s: float
    bytes_per_s: float


@torch.inference_mode()
def measure_products(dtype: torch.dtype) -> ProductRates:
    """Times packed products of one row and of many.

    A product takes the time to read the weights and the time to compute, one after the other: `bytes / bytes_per_s +
    flops / flops_per_s`; two numbers of rows give both rates.
    """
    outputs, inputs = PRODUCT_SHAPE
    layers = _product_layers(dtype)
    one_s, many_s = (_product_seconds(layers, torch.randn(rows, inputs).to(dtype)) for rows in (1, ROWS))
    row_s = (many_s - one_s) / (ROWS - 1)
    return ProductRates(outputs * inputs * dtype.itemsize / (one_s - row_s), 2 * outputs * inputs / row_s)


def measure_shared_products(dtype: torch.dtype) -> ProductRates:
    """The same while another process reads weights on another core without pause."""
    command = [sys.executable, "-m", "benchmarks.host_costs", str(dtype).removeprefix("torch.")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        try:
            if not other.stdout.readline():
                raise RuntimeError(f"the other process ended with {other.wait()}")
            rates = measure_products(dtype)
            if other.poll() is not None:
                raise RuntimeError(f"the other process ended with {other.returncode} before the measurement did")
            return rates
        finally:
            other.stdin.close()


def measure_software(demo: MeasuredEngine) -> SoftwareCosts:
    """Runs the demo with one stream and with several, of one organ and of all, with short and with long prompts.

    Args:
        demo: an engine of the demo with its experts in this process.
    """
    organs = demo.expert_set.organs
    config = demo.config
    layers = config.num_hidden_layers
    single = _decode(demo, 1, organs[:1], SHORT_PROMPT)
    several = _decode(demo, STREAMS, organs[:1], SHORT_PROMPT)
    spread = _decode(demo, STREAMS, organs, SHORT_PROMPT)
    long = _decode(demo, STREAMS, organs[:1], LONG_PROMPT)
    groups = min(STREAMS, len(organs))
    gate_s = (_layer_seconds(spread, layers) - _layer_seconds(several, layers)) / (groups - 1)
    one_s = _layer_seconds(single, layers)
    token_s = (_outside_seconds(several) - _outside_seconds(single)) / (STREAMS - 1)
    head_dim = config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads or config.num_attention_heads
    cached_bytes = 2 * heads * head_dim * demo.runner.model.dtype.itemsize
    read_bytes = STREAMS * (LONG_PROMPT - SHORT_PROMPT) * cached_bytes
    added_s = (median_totals(long)["attention"] - median_totals(several)["attention"]) / layers
    return SoftwareCosts(
        layer_s=one_s - gate_s,
        sequence_s=max(0.0, (_layer_seconds(several, layers) - one_s) / (STREAMS - 1)),
        step_s=_outside_seconds(single) - token_s,
        token_s=token_s,
        gate_s=gate_s,
        kernel_s=median_totals(single)[KERNEL] / layers,
        cache_bytes_per_s=read_bytes / added_s,
    )


def measure_exchange(demo: MeasuredEngine) -> ExchangeCosts:
    """Exchanges while the engine is idle.

    Args:
        demo: an engine of the demo with its experts in other processes.
    """
    organ = demo.expert_set.organs[0]
    placement = demo.runner.dispatcher.placement
    config = demo.config
    digest = demo.expert_set.bundle_digest(organ)
    sending, seconds = {}, {}
    for tokens in (FEW_TOKENS, MANY_TOKENS):
        x_TD = torch.randn(tokens, config.hidden_size).to(demo.runner.model.dtype)
        index_TK = torch.arange(config.num_experts_per_tok, dtype=torch.int32).repeat(tokens, 1)
        weight_TK = torch.full(index_TK.shape, 0.5, dtype=x_TD.dtype)
        send_s, round_s = [], []
        for _ in range(EXCHANGES):
            began = time.perf_counter()
            exchange = placement.send(organ, digest, 0, x_TD, index_TK, weight_TK)
            send_s.append(time.perf_counter() - began)
            exchange.result()
            round_s.append(time.perf_counter() - began - exchange.compute_s)
        sending[tokens], seconds[tokens] = statistics.median(send_s), statistics.median(round_s)
    more_bytes = 2 * config.hidden_size * x_TD.element_size() * (MANY_TOKENS - FEW_TOKENS)
    added_s = seconds[MANY_TOKENS] - seconds[FEW_TOKENS]
    return ExchangeCosts(sending[FEW_TOKENS], seconds[FEW_TOKENS], more_bytes / added_s)


def _decode(demo: MeasuredEngine, streams: int, organs: Sequence[str], prompt_tokens: int) -> list[Step]:
    workload = random_workload(
        streams,
        prompt_tokens=prompt_tokens,
        new_tokens=NEW_TOKENS,
        vocab_size=demo.config.vocab_size,
        organs=organs,
        seed=f"host {streams} {len(organs)} {prompt_tokens}",
    )
    with timeline_of(demo.engine) as timeline:
        demo.run(workload)
        return [step for step in timeline.steps() if step.rows == (1,) * streams]


def _layer_seconds(steps: Sequence[Step], layers: int) -> float:
    """What a layer takes without its experts' kernels."""
    return statistics.median((totals[LAYER] - totals[KERNEL]) / layers for totals in (step.totals() for step in steps))


def _outside_seconds(steps: Sequence[Step]) -> float:
    return statistics.median(step.seconds - totals[LAYER] for step in steps for totals in (step.totals(),))


def _product_layers(dtype: torch.dtype) -> list[PackedLinear]:
    outputs, inputs = PRODUCT_SHAPE
    count = -(-PRODUCT_BYTES // (outputs * inputs * dtype.itemsize))
    return [PackedLinear(torch.randn(outputs, inputs).to(dtype), None) for _ in range(count)]


def _product_seconds(layers: list[PackedLinear], x: torch.Tensor) -> float:
    times = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        for layer in layers:
            layer(x)
        times.append((time.perf_counter() - began) / len(layers))
    return statistics.median(times)


@torch.inference_mode()
def main() -> None:
    """Multiplies one row by weights of the given dtype until the standard input is closed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dtype", choices=("float32", "bfloat16"), help="of the weights")
    dtype = getattr(torch, parser.parse_args().dtype)
    torch.set_num_threads(1)
    layers, x = _product_layers(dtype), torch.randn(1, PRODUCT_SHAPE[1]).to(dtype)
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        for layer in layers:
            layer(x)


if __name__ == "__main__":
    main()
