"""The lower bound of a decode step on two cores, compared with its real time: `python -m benchmarks.decode_floor`.

In every run, in turn: the served system; while it is up and idle, the products of a step alone, divided over
both cores with nothing between them (`benchmarks.systems.products`); the same with the served system down; and plain
`generate`, whose multiple is the target. Writes `benchmarks/results/decode_floor_<config>_<dtype>.md` and `.json`.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from benchmarks.checkpoints import DTYPES, BenchCheckpoint, add_options, checkpoint_with_progress
from benchmarks.machine import describe
from benchmarks.systems.protocol import MeasuredSystem, SystemFailedError, exit_on_sigterm
from benchmarks.terminal import progress_of_parts, show_result
from benchmarks.throughput import LEAST_BATCH, RESULTS, Plan, start
from benchmarks.throughput_table import DECODE_TARGETS, GENERATE, SERVED, System

SERVED_SYSTEM, GENERATE_SYSTEM = System.parse(SERVED), System.parse(GENERATE)
PRODUCTS_STEPS = 4
TITLES = {
    "served": "served system",
    "beside": "products alone, divided over both cores, beside the idle served system",
    "alone": "products alone, divided over both cores, nothing beside",
    "generate": str(GENERATE_SYSTEM),
}

# What is measured → streams → tokens a second of each run.
Rates = Mapping[str, Mapping[int, list[float]]]


def measure(checkpoint: BenchCheckpoint, runs: int, new_tokens: int, console: Console) -> Rates:
    """Decoded tokens a second of everything in `TITLES`."""
    plan = Plan((), tuple(DECODE_TARGETS), runs, 128, new_tokens, spread=False)
    # Steps of products are short and alike.
    products_plan = Plan((), tuple(DECODE_TARGETS), runs, 1, PRODUCTS_STEPS * new_tokens, spread=False)
    rates: dict[str, dict[int, list[float]]] = {what: {streams: [] for streams in DECODE_TARGETS} for what in TITLES}
    with ExitStack() as residents, progress_of_parts(console) as progress:
        task = progress.add_task("starting", total=len(TITLES) * len(DECODE_TARGETS) * runs)

        def take(what: str, system: MeasuredSystem, run: int, asked: Plan) -> None:
            for streams in DECODE_TARGETS:
                progress.update(task, description=f"run {run} of {runs}: {what}, {streams} streams")
                timings = system.run(asked.workload(checkpoint, streams, run))
                rates[what][streams].append(timings.decode_tokens_per_s)
                progress.advance(task)

        arguments = ["-m", "benchmarks.systems.products", "--checkpoint", str(checkpoint.released.absolute())]
        products = residents.enter_context(MeasuredSystem(arguments, {"OMP_NUM_THREADS": "1"}))
        generate = residents.enter_context(start(GENERATE_SYSTEM, checkpoint, LEAST_BATCH))
        for system, asked in ((products, products_plan), (generate, plan)):
            _make_ready(system, asked, checkpoint)
        for run in range(1, runs + 1):
            progress.update(task, description=f"run {run} of {runs}: starting the served system")
            with start(SERVED_SYSTEM, checkpoint, LEAST_BATCH) as served:
                _make_ready(served, plan, checkpoint)
                take("served", served, run, plan)
                take("beside", products, run, products_plan)
            take("alone", products, run, products_plan)
            take("generate", generate, run, plan)
    return rates


def _make_ready(system: MeasuredSystem, plan: Plan, checkpoint: BenchCheckpoint) -> None:
    system.wait_until_ready()
    for streams in DECODE_TARGETS:
        system.run(plan.warm_up(checkpoint, streams))


def report(checkpoint: BenchCheckpoint, rates: Rates, runs: int) -> str:
    """The result as Markdown."""
    lines = [
        f"# The floor of a decoding step: {checkpoint.name.replace('_', ' ')}, {checkpoint.dtype}",
        "",
        describe(),
        f"{runs} runs, everything in turn within each; medians, and the range of all runs. Ratios are taken within "
        "each run; `python -m benchmarks.decode_floor`.",
        "",
        "| | streams | tokens/s | a step, ms | ÷ plain `generate` | of all runs | target of the served system |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for streams, target in DECODE_TARGETS.items():
        for what, title in TITLES.items():
            values = rates[what][streams]
            ratios = _ratios(values, rates["generate"][streams])
            middle = statistics.median(values)
            lines.append(
                f"| {title} | {streams} | {middle:.1f} | {1e3 * streams / middle:.1f} | "
                f"**{statistics.median(ratios):.2f}** | {min(ratios):.2f} to {max(ratios):.2f} | ≥ {target} |"
            )
    lines += [
        "",
        "The products are those of a step, packed, and nothing else of it: no attention over the cache, gates, norms, "
        "sampling, or exchange. Each of two processes computes half of every matrix and never waits for the other.",
    ]
    return "\n".join(lines) + "\n"


def _ratios(values: Sequence[float], bases: Sequence[float]) -> list[float]:
    return [value / base for value, base in zip(values, bases, strict=True)]


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--config", default="4_experts", help="config_<name>.json (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of all weights (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="of everything (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each stream (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results (default: %(default)s)")
    options = parser.parse_args()
    exit_on_sigterm()
    console = Console(stderr=options.json)
    checkpoint = checkpoint_with_progress(options.config, options.dtype, options.configs, options.checkpoints, console)
    try:
        rates = measure(checkpoint, options.runs, options.new_tokens, console)
    except SystemFailedError as error:
        sys.exit(f"a measured system failed:\n{error}")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing was written")
    text = report(checkpoint, rates, options.runs)
    values = {
        "machine": describe(),
        "config": checkpoint.name,
        "dtype": checkpoint.dtype,
        "new_tokens": options.new_tokens,
        "tokens_per_s": rates,
        "targets": DECODE_TARGETS,
    }
    show_result(text, values, console, as_json=options.json)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"decode_floor_{checkpoint.name}_{checkpoint.dtype}"
    path.with_suffix(".md").write_text(text)
    path.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
