"""What a decoder layer's time is spent on, in decoding and in prefill: `python -m benchmarks.layer_costs`.

The engine runs in this process with one thread, its experts in processes of their own and then in this one. The
figures are medians over steps, divided by the number of layers. Writes `benchmarks/results/layer_costs.md`, `.png` and
`.json`; the last is what `benchmarks.scaling_model` reads. The machine should be idle.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.checkpoints import DTYPES, ROOT, BenchCheckpoint, add_options, bench_checkpoint
from benchmarks.drawing import check_drawing, load_pyplot
from benchmarks.host_costs import measure_exchange, measure_products, measure_shared_products, measure_software
from benchmarks.machine import describe
from benchmarks.measured_engine import MeasuredEngine, Placement, become_router_process, measured_engine
from benchmarks.step_timeline import HEAD, KERNEL, LAYER, LAYER_PARTS, Step, median_totals, timeline_of
from benchmarks.workload import Workload, random_workload
from echovlm_ray.checkpoint.demo import make_demo
from echovlm_ray.checkpoint.layout import ORGANS

RESULTS = Path(__file__).resolve().parent / "results"
CONFIG = "4_experts"
DEMO = ROOT / "checkpoints" / "demo"
PLACEMENTS: tuple[Placement, ...] = ("remote", "in process")
BATCHES = (1, 8, 32)
PROMPT_TOKENS = 128
PREFILL_TOKENS = 512
PREFILLS = 3
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Cost:
    """One line of the result.

    Attributes:
        organs: among how many the sequences are divided.
        rows: tokens in a step: as many as sequences when decoding.
        tokens_per_s: without any hook or stopwatch; of prefill, up to the first token.
        step_s: median, with them.
        head_s: the head's part of it.
        layer_s: one layer's part of it.
        parts: seconds of a layer by part; those of `KERNEL` pass beside the others when experts are remote, and are
            the sum over all organs.
    """

    dtype: str
    placement: Placement
    phase: str
    organs: int
    rows: int
    context: int
    tokens_per_s: float
    step_s: float
    head_s: float
    layer_s: float
    parts: dict[str, float]

    @property
    def label(self) -> str:
        """What was run, in words."""
        what = f"{self.rows} tokens" if self.phase == "prefill" else f"batch {self.rows}"
        return f"{self.phase}, {what}" + (f", {self.organs} organs" if self.organs > 1 else "")


def cost_of(steps: Sequence[Step], layers: int, *, in_process: bool) -> tuple[float, float, float, dict[str, float]]:
    """Median seconds of a step, of the head, of a layer, and of the layer's parts.

    Args:
        steps: that computed the same.
        layers: of the model.
        in_process: whether the kernel's time is a part of the layer's.
    """
    totals = median_totals(steps)
    parts = {part: totals.get(part, 0.0) / layers for part in (*LAYER_PARTS, KERNEL)}
    layer_s = totals[LAYER] / layers
    inside = sum(parts[part] for part in LAYER_PARTS) + (parts[KERNEL] if in_process else 0.0)
    parts[OTHER] = layer_s - inside
    return statistics.median(step.seconds for step in steps), totals[HEAD], layer_s, parts


def measure(
    measured: MeasuredEngine, checkpoint: BenchCheckpoint, placement: Placement, case: tuple[str, int, int], new: int
) -> Cost:
    """One line, a case of `cases`: a run without any instrument, then one with."""
    phase, organs, rows = case
    layers = int(checkpoint.config["num_hidden_layers"])

    def workload(run: int) -> Workload:
        decode = phase == "decode"
        return random_workload(
            rows if decode else 1,
            prompt_tokens=PROMPT_TOKENS if decode else rows,
            new_tokens=new if decode else 2,
            vocab_size=checkpoint.config["vocab_size"],
            organs=checkpoint.organs[:organs],
            seed=f"{run} {organs} {rows}",
        )

    if phase == "decode":
        # Twice the same, so that the second run need not compute the prompts again.
        runs = [workload(0)]
        tokens_per_s = measured.run(runs[0]).decode_tokens_per_s
        wanted = (1,) * rows
    else:
        plain = [measured.run(workload(run)) for run in range(PREFILLS)]
        tokens_per_s = statistics.median(timings.prefill_tokens_per_s for timings in plain)
        runs = [workload(PREFILLS + run) for run in range(PREFILLS)]
        wanted = (rows,)
    with timeline_of(measured.engine) as timeline:
        for run in runs:
            measured.run(run)
        steps = [step for step in timeline.steps() if step.rows == wanted]
    if not steps:
        raise RuntimeError(f"no step computed {wanted}: the engine divided the work otherwise")
    context = PROMPT_TOKENS + new // 2 if phase == "decode" else rows // 2
    figures = cost_of(steps, layers, in_process=placement == "in process")
    return Cost(checkpoint.dtype, placement, phase, organs, rows, context, tokens_per_s, *figures)


def cases(batches: Sequence[int], organs: int) -> Iterator[tuple[str, int, int]]:
    """Phase, organs and rows of every line of one checkpoint and placement; `organs` is the most that a line has."""
    for batch in batches:
        for spread in dict.fromkeys((1, organs if batch > 1 else 1)):
            yield "decode", spread, batch
    yield "prefill", 1, PREFILL_TOKENS


def markdown(costs: Sequence[Cost], result: dict[str, Any]) -> str:
    """The result file's text."""
    shown = (*LAYER_PARTS, OTHER)
    lines = [
        "# Cost of a decoder layer",
        "",
        result["machine"],
        f"Configuration `config_{result['configuration']}.json`, one thread a process, {PROMPT_TOKENS} prompt tokens; "
        "`python -m benchmarks.layer_costs`. Microseconds of one layer, medians over steps. `kernel` is the experts' "
        "own time, added up over the organs: with remote experts it passes beside the rest, and `wait` is what is left "
        "of it and of the way there and back when dense MLP and shared expert are done. `attention` comes with both "
        "norms and the residual sum. tokens/s is of the engine without any instrument; "
        "`step` is the whole step in milliseconds, with the head and all that is outside the "
        "layers. Sequences are divided among the organs in turn.",
        "",
        "![Parts of a layer](layer_costs.png)",
    ]
    for dtype in dict.fromkeys(cost.dtype for cost in costs):
        for placement in PLACEMENTS:
            lines += [
                "",
                f"## {dtype}, experts {placement}",
                "",
                f"| | {' | '.join(shown)} | layer | kernel | step, ms | tokens/s |",
                "| --- " + "| ---: " * (len(shown) + 4) + "|",
            ]
            for cost in costs:
                if (cost.dtype, cost.placement) == (dtype, placement):
                    figures = [cost.parts[part] for part in shown] + [cost.layer_s, cost.parts[KERNEL]]
                    cells = [f"{1e6 * seconds:.0f}" for seconds in figures]
                    cells += [f"{1e3 * cost.step_s:.1f}", f"{cost.tokens_per_s:.0f}"]
                    lines.append(f"| {cost.label} | {' | '.join(cells)} |")
    lines += [
        "",
        "## What the scaling model is given",
        "",
        "Rates of packed products in a size of their own, and the software's cost measured on the demo.",
        "",
        "| what | value |",
        "| --- | ---: |",
        *(f"| {what} | {value} |" for what, value in _given(result)),
    ]
    return "\n".join(lines) + "\n"


def _given(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    def microseconds(*seconds: float) -> str:
        return "; ".join(f"{1e6 * value:.0f}" for value in seconds)

    for dtype, rates in result["products"].items():
        software = result["software"][dtype]
        alone, shared = rates["alone"], rates["shared"]
        yield (
            f"{dtype}: weights read; while another process reads too, GB/s",
            f"{alone['bytes_per_s'] / 1e9:.1f}; {shared['bytes_per_s'] / 1e9:.1f}",
        )
        yield (
            f"{dtype}: computed; while another process reads, GFLOP/s",
            f"{alone['flops_per_s'] / 1e9:.0f}; {shared['flops_per_s'] / 1e9:.0f}",
        )
        yield f"{dtype}: keys and values read, GB/s", f"{software['cache_bytes_per_s'] / 1e9:.1f}"
        yield (
            f"{dtype}: software of a layer; of each sequence in it, µs",
            microseconds(software["layer_s"], software["sequence_s"]),
        )
        yield (
            f"{dtype}: software of an exchange in this process; of its kernel, µs",
            microseconds(software["gate_s"], software["kernel_s"]),
        )
        yield (
            f"{dtype}: software of a step; of each token in it, µs",
            microseconds(software["step_s"], software["token_s"]),
        )
    exchange = result["exchange"]
    yield "sending one exchange, µs", microseconds(exchange["send_s"])
    yield "a token's round trip to an expert process without the kernel, µs", microseconds(exchange["round_trip_s"])
    yield "bytes of larger exchanges, both ways together, GB/s", f"{exchange['bytes_per_s'] / 1e9:.2f}"


def plot(costs: Sequence[Cost], path: Path) -> None:
    """Bars of one layer for every line, stacked by part."""
    dtypes = list(dict.fromkeys(cost.dtype for cost in costs))
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(
        len(dtypes), len(PLACEMENTS), figsize=(14, 4 * len(dtypes)), layout="constrained", squeeze=False
    )
    parts = (*LAYER_PARTS, KERNEL, OTHER)
    colors = dict(zip(parts, pyplot.get_cmap("tab20").colors, strict=False))
    for dtype, row in zip(dtypes, axes, strict=True):
        for placement, axis in zip(PLACEMENTS, row, strict=True):
            own = [cost for cost in costs if (cost.dtype, cost.placement) == (dtype, placement)]
            labels = [cost.label for cost in own]
            left = [0.0] * len(own)
            for part in parts:
                if part == KERNEL and placement == "remote":
                    continue
                # As a share, because a prefill takes a hundred times as long as a decode step.
                shares = [100 * max(0.0, cost.parts[part]) / cost.layer_s for cost in own]
                axis.barh(labels, shares, left=left, color=colors[part], label=part)
                left = [begin + share for begin, share in zip(left, shares, strict=True)]
            for position, cost in enumerate(own):
                axis.text(101, position, f"{1e3 * cost.layer_s:.2f} ms", va="center", fontsize="small")
            axis.invert_yaxis()
            axis.set_xlim(0, 115)
            axis.set_xlabel("% of a layer")
            axis.set_title(f"{dtype}, experts {placement}")
    handles, names = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(parts))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--config", default=CONFIG, help="config_<name>.json (default: %(default)s)")
    parser.add_argument("--dtype", nargs="+", default=tuple(DTYPES), choices=DTYPES, help="(default: all)")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="of decoding (default: %(default)s)")
    parser.add_argument(
        "--organs", type=int, default=len(ORGANS), help="the most that sequences are divided among (default: all)"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="of every sequence (default: %(default)s)")
    parser.add_argument("--demo", type=Path, default=DEMO, help="made if it is not there (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result (default: %(default)s)")
    options = parser.parse_args()
    check_drawing()
    become_router_process("benchmarks.layer_costs")
    console = Console()
    torch.set_num_threads(1)
    costs: list[Cost] = []
    make_demo(options.demo)
    result: dict[str, Any] = {"machine": describe(), "configuration": options.config, "products": {}, "software": {}}
    with Progress(console=console) as progress:
        task = progress.add_task("the demo", total=None)
        with measured_engine(options.demo, "remote", organs=ORGANS[:1]) as measured:
            result["exchange"] = asdict(measure_exchange(measured))
        for dtype in options.dtype:
            alone, shared = measure_products(DTYPES[dtype]), measure_shared_products(DTYPES[dtype])
            result["products"][dtype] = {"alone": asdict(alone), "shared": asdict(shared)}
            with measured_engine(options.demo, "in process", dtype=dtype) as measured:
                result["software"][dtype] = asdict(measure_software(measured))
            checkpoint = bench_checkpoint(options.config, dtype, configs=options.configs, folder=options.checkpoints)
            organs = checkpoint.organs[: options.organs]
            lines = list(cases(options.batches, max(1, len(organs))))
            result["config"] = dict(checkpoint.config)
            if progress.tasks[task].total is None:
                progress.update(task, total=len(lines) * len(PLACEMENTS) * len(options.dtype))
            for placement in PLACEMENTS:
                progress.update(task, description=f"{dtype}, experts {placement}")
                with measured_engine(
                    checkpoint.split, placement, organs=organs, max_batch_size=max(options.batches)
                ) as measured:
                    # A run that does not count.
                    measure(measured, checkpoint, placement, lines[0], options.new_tokens)
                    for case in lines:
                        costs.append(measure(measured, checkpoint, placement, case, options.new_tokens))
                        progress.advance(task)
    result["costs"] = [asdict(cost) for cost in costs]
    text = markdown(costs, result)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "layer_costs.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.output / "layer_costs.md").write_text(text)
    plot(costs, options.output / "layer_costs.png")
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
