"""What the scaling model is given of a machine, and what it is compared with: `python -m benchmarks.host_costs`.

How fast products run, measured in a size of their own; what the software around them costs, measured on two small
models that differ in their number of layers alone, and whose products take next to no time; and, to be predicted, the
tokens a second of an engine of this process with its experts in processes of their own and then in this one. One
thread each. Writes `benchmarks/results/host_costs.json`, which `benchmarks.scaling_model` reads. The machine should
have nothing else to do.
"""

import argparse
import json
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from rich.console import Console

from benchmarks.checkpoints import DTYPES, BenchCheckpoint, add_options, bench_checkpoint
from benchmarks.machine import describe
from benchmarks.measured_engine import MeasuredEngine, Placement, become_router_process, measured_engine
from benchmarks.terminal import progress_of_parts
from benchmarks.workload import random_workload
from echovlm_ray.checkpoint.layout import ORGANS
from experts.kernels.packed_linear import PackedLinear

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CONFIG = "4_experts"
PLACEMENTS: tuple[Placement, ...] = ("remote", "in process")
BATCHES = (1, 8, 32)
PROMPT_TOKENS = 128
# A layer's product and how many different ones: more than a processor's cache together.
PRODUCT_SHAPE = (2816, 1024)
PRODUCT_BYTES = 192 * 2**20
ROWS = 32
REPETITIONS = 20
# Tokens of the exchanges by which latency and bandwidth are distinguished.
FEW_TOKENS, MANY_TOKENS = 1, 2048
EXCHANGES = 50
# Of the small models.
FEW_LAYERS, MANY_LAYERS = 2, 14
STREAMS = 8
NEW_TOKENS = 48
SMALL: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 4},
    "image_token_id": 8180,
    "video_token_id": 8181,
    "vision_start_token_id": 8182,
    "vision_end_token_id": 8183,
    "bos_token_id": 8184,
    "eos_token_id": 8185,
    "pad_token_id": 8186,
}


class DecodingCase(NamedTuple):
    """Streams that decode together, divided among so many organs."""

    streams: int
    organs: int
    prompt_tokens: int


SINGLE, SEVERAL = DecodingCase(1, 1, 32), DecodingCase(STREAMS, 1, 32)
SPREAD, LONG = DecodingCase(STREAMS, len(ORGANS), 32), DecodingCase(STREAMS, 1, 480)
CASES = (SINGLE, SEVERAL, SPREAD, LONG)


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
    command = [sys.executable, "-m", "benchmarks.host_costs", "--multiply", str(dtype).removeprefix("torch.")]
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


def measure_software(small: Mapping[int, MeasuredEngine], runs: int) -> SoftwareCosts:
    """Decodes with one stream and with several, of one organ and of all, with short and with long prompts.

    Args:
        small: engines of the small models by their number of layers, with their experts in this process.
        runs: of every case, of which the best counts.
    """
    demo = small[FEW_LAYERS]
    organs, config = demo.expert_set.organs, demo.config
    seconds = {
        (layers, case): _step_seconds(measured, case, organs, runs)
        for layers, measured in small.items()
        for case in CASES
    }
    head_dim = config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads or config.num_attention_heads
    cached_bytes = 2 * heads * head_dim * demo.runner.model.dtype.itemsize
    return software_costs(seconds, statistics.median(_exchanges(demo, FEW_TOKENS)["compute"]), cached_bytes)


def software_costs(
    seconds: Mapping[tuple[int, DecodingCase], float], kernel_s: float, cached_bytes: int
) -> SoftwareCosts:
    """Solves for the costs: what grows with the layers is a layer's, the rest is the step's.

    Args:
        seconds: of a step, by layers and case.
        kernel_s: see `SoftwareCosts`.
        cached_bytes: of one token's keys and values in one layer.
    """

    def layer(case: DecodingCase) -> float:
        return (seconds[MANY_LAYERS, case] - seconds[FEW_LAYERS, case]) / (MANY_LAYERS - FEW_LAYERS)

    def outside(case: DecodingCase) -> float:
        return seconds[FEW_LAYERS, case] - FEW_LAYERS * layer(case)

    gate_s = (layer(SPREAD) - layer(SEVERAL)) / (SPREAD.organs - 1) - kernel_s
    token_s = (outside(SEVERAL) - outside(SINGLE)) / (STREAMS - 1)
    read_bytes = STREAMS * (LONG.prompt_tokens - SEVERAL.prompt_tokens) * cached_bytes
    return SoftwareCosts(
        layer_s=layer(SINGLE) - gate_s - kernel_s,
        sequence_s=max(0.0, (layer(SEVERAL) - layer(SINGLE)) / (STREAMS - 1)),
        step_s=outside(SINGLE) - token_s,
        token_s=token_s,
        gate_s=gate_s,
        kernel_s=kernel_s,
        cache_bytes_per_s=read_bytes / (layer(LONG) - layer(SEVERAL)),
    )


def measure_exchange(demo: MeasuredEngine) -> ExchangeCosts:
    """Exchanges while the engine is idle.

    Args:
        demo: an engine with its experts in other processes.
    """
    few, many = (_exchanges(demo, tokens) for tokens in (FEW_TOKENS, MANY_TOKENS))
    few_s, many_s = (statistics.median(each["round trip"]) for each in (few, many))
    itemsize = demo.runner.model.dtype.itemsize
    more_bytes = 2 * demo.config.hidden_size * itemsize * (MANY_TOKENS - FEW_TOKENS)
    return ExchangeCosts(statistics.median(few["send"]), few_s, more_bytes / (many_s - few_s))


def _exchanges(demo: MeasuredEngine, tokens: int) -> dict[str, list[float]]:
    """Seconds of sending, of the kernel, and of the rest of the round trip, of exchanges one after the other."""
    organ = demo.expert_set.organs[0]
    config, placement = demo.config, demo.runner.dispatcher.placement
    x_TD = torch.randn(tokens, config.hidden_size).to(demo.runner.model.dtype)
    index_TK = torch.arange(config.num_experts_per_tok, dtype=torch.int32).repeat(tokens, 1)
    weight_TK = torch.full(index_TK.shape, 0.5, dtype=x_TD.dtype)
    found: dict[str, list[float]] = {"send": [], "compute": [], "round trip": []}
    for _ in range(EXCHANGES):
        began = time.perf_counter()
        call = placement.send(organ, demo.expert_set.bundle_digest(organ), 0, x_TD, index_TK, weight_TK)
        found["send"].append(time.perf_counter() - began)
        call.result()
        found["compute"].append(call.compute_s)
        found["round trip"].append(time.perf_counter() - began - call.compute_s)
    return found


def _step_seconds(measured: MeasuredEngine, case: DecodingCase, organs: Sequence[str], runs: int) -> float:
    # The best: nothing makes a step shorter than it is.
    asked = (measured, case.streams, organs[: case.organs], case.prompt_tokens, NEW_TOKENS)
    return min(case.streams / decode_tokens_per_s(*asked, f"{run}") for run in range(runs))


def decode_tokens_per_s(
    measured: MeasuredEngine, streams: int, organs: Sequence[str], prompt_tokens: int, new_tokens: int, seed: str
) -> float:
    """Tokens a second of streams that decode together."""
    workload = random_workload(
        streams,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        vocab_size=measured.config.vocab_size,
        organs=organs,
        seed=f"{seed} {streams} {len(organs)} {prompt_tokens}",
    )
    return measured.run(workload).decode_tokens_per_s


@contextmanager
def small_models(dtype: str, configs: Path) -> Iterator[dict[int, BenchCheckpoint]]:
    """The small models by their number of layers, until the block ends."""
    config = json.loads((configs / f"config_{CONFIG}.json").read_text()) | SMALL
    with TemporaryDirectory(prefix="echovlm-small-") as temporary:
        folder = Path(temporary)
        for layers in (FEW_LAYERS, MANY_LAYERS):
            (folder / f"config_{layers}.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        yield {
            layers: bench_checkpoint(str(layers), dtype, configs=folder, folder=folder)
            for layers in (FEW_LAYERS, MANY_LAYERS)
        }


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
def multiply(dtype: torch.dtype) -> None:
    """Multiplies one row until the standard input is closed: another process that takes its share of the bandwidth."""
    layers, x = _product_layers(dtype), torch.randn(1, PRODUCT_SHAPE[1]).to(dtype)
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        for layer in layers:
            layer(x)


def measure_decoding(
    checkpoint: BenchCheckpoint, options: argparse.Namespace, begun: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Tokens a second of every batch, divided among one organ and among all, with the experts in either place."""
    new_tokens = options.new_tokens
    all_organs = checkpoint.organs[: options.organs]
    for placement in PLACEMENTS:
        with measured_engine(
            checkpoint.split, placement, organs=all_organs, max_batch_size=max(options.batches)
        ) as measured:
            # A run that does not count.
            decode_tokens_per_s(measured, 1, all_organs[:1], PROMPT_TOKENS, new_tokens, "warm")
            for batch in options.batches:
                for organs in dict.fromkeys((1, len(all_organs) if batch > 1 else 1)):
                    begun(f"{checkpoint.dtype}, experts {placement}, batch {batch}")
                    asked = (measured, batch, all_organs[:organs], PROMPT_TOKENS, new_tokens)
                    found = statistics.median(decode_tokens_per_s(*asked, f"{run}") for run in range(options.runs))
                    yield {
                        "dtype": checkpoint.dtype,
                        "placement": placement,
                        "organs": organs,
                        "batch": batch,
                        "context": PROMPT_TOKENS + new_tokens // 2,
                        "tokens_per_s": found,
                    }


def measure_all(options: argparse.Namespace, begun: Callable[[str], None]) -> dict[str, Any]:
    """The whole result."""
    result: dict[str, Any] = {"machine": describe(), "products": {}, "software": {}, "decoding": []}
    for dtype in options.dtype:
        begun(f"{dtype}, products")
        alone, shared = measure_products(DTYPES[dtype]), measure_shared_products(DTYPES[dtype])
        result["products"][dtype] = {"alone": asdict(alone), "shared": asdict(shared)}
        with small_models(dtype, options.configs) as small:
            begun(f"{dtype}, software")
            with (
                measured_engine(small[FEW_LAYERS].split, "in process") as fewer,
                measured_engine(small[MANY_LAYERS].split, "in process") as more,
            ):
                software = measure_software({FEW_LAYERS: fewer, MANY_LAYERS: more}, options.runs)
            result["software"][dtype] = asdict(software)
            if "exchange" not in result:
                begun("exchanges")
                few = small[FEW_LAYERS]
                with measured_engine(few.split, "remote", organs=few.organs[:1]) as measured:
                    result["exchange"] = asdict(measure_exchange(measured))
        checkpoint = bench_checkpoint(options.config, dtype, configs=options.configs, folder=options.checkpoints)
        result["config"] = dict(checkpoint.config)
        result["decoding"] += measure_decoding(checkpoint, options, begun)
    return result


def main() -> None:
    """Measures, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--config", default=CONFIG, help="config_<name>.json (default: %(default)s)")
    parser.add_argument("--dtype", nargs="+", default=tuple(DTYPES), choices=DTYPES, help="(default: all)")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="of decoding (default: %(default)s)")
    parser.add_argument("--organs", type=int, default=len(ORGANS), help="the most that have sequences (default: all)")
    parser.add_argument("--new-tokens", type=int, default=32, help="of every sequence (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="of everything that decodes (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result (default: %(default)s)")
    parser.add_argument("--multiply", choices=DTYPES, help="only multiply, until the standard input is closed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.multiply is not None:
        multiply(DTYPES[options.multiply])
        return
    become_router_process("benchmarks.host_costs")
    with progress_of_parts(Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=None)
        result = measure_all(options, lambda what: progress.update(task, description=what))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "host_costs.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
