"""Tokens a second and latencies of the served system, side by side with others: `python -m benchmarks.throughput`.

Three systems with the same weights, each in processes of its own: the whole served system, driven at the router; the
engine with all experts in its process; and plain `generate` of transformers. In every run each gets the same workload,
one system after the other, so that what changes on the machine changes for all. Greedy, no end token, prompts of random
tokens, no two alike. The machine should be idle.

A whole run writes `benchmarks/results/throughput_<config>_<dtype>.md`, `.json` and `.png`.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.checkpoints import DTYPES, BenchCheckpoint, add_options, checkpoint_with_progress
from benchmarks.drawing import check_drawing
from benchmarks.machine import describe
from benchmarks.measured_engine import router_environment
from benchmarks.plots import plot_throughput
from benchmarks.systems.protocol import MeasuredSystem, SystemFailedError, exit_on_sigterm
from benchmarks.terminal import RESULTS, keep_result, progress_of_parts, show_result
from benchmarks.throughput_table import ENGINE, GENERATE, SERVED, Cell, System, cell_table, ratio_table, ratios
from benchmarks.workload import Workload, random_workload

LEAST_BATCH = 32
WARM_UP_PROMPT_TOKENS, WARM_UP_NEW_TOKENS = 32, 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    systems: tuple[System, ...]
    streams: tuple[int, ...]
    runs: int
    prompt_tokens: int
    new_tokens: int
    spread: bool

    def workload(self, checkpoint: BenchCheckpoint, streams: int, run: int) -> Workload:
        """The same for all systems, and never the same twice."""
        return self._random(checkpoint, streams, self.prompt_tokens, self.new_tokens, f"run {run}, {streams} streams")

    def warm_up(self, checkpoint: BenchCheckpoint, streams: int) -> Workload:
        """As many streams, but short ones."""
        prompt_tokens = min(WARM_UP_PROMPT_TOKENS, self.prompt_tokens)
        new_tokens = min(WARM_UP_NEW_TOKENS, self.new_tokens)
        return self._random(checkpoint, streams, prompt_tokens, new_tokens, f"warm-up, {streams} streams")

    def _random(
        self, checkpoint: BenchCheckpoint, streams: int, prompt_tokens: int, new_tokens: int, seed: str
    ) -> Workload:
        return random_workload(
            streams,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            vocab_size=checkpoint.config["vocab_size"],
            organs=checkpoint.organs if self.spread else checkpoint.organs[:1],
            seed=seed,
        )


def start(system: System, checkpoint: BenchCheckpoint, max_batch_size: int) -> MeasuredSystem:
    """Starts a system's process; it loads while others do."""
    source = checkpoint.released if system.kind == GENERATE else checkpoint.split
    arguments = ["-m", f"benchmarks.systems.{system.kind}"]
    arguments += ["--checkpoint", str(source.absolute()), "--threads", str(system.threads)]
    environment = {"OMP_NUM_THREADS": str(system.threads)}
    if system.kind != GENERATE:
        arguments += ["--max-batch-size", str(max_batch_size)]
        # The allocator's settings are those of the router's own process.
        environment |= router_environment(system.threads)
    return MeasuredSystem(arguments, environment)


def measure(plan: Plan, checkpoint: BenchCheckpoint, console: Console) -> list[Cell]:
    """Measures all systems in turn, in every run again.

    The served system is up only while it is measured: even when it is idle, its processes check each other.
    The others cost nothing while they wait, and stay.
    """
    cells = {(system, streams): Cell(system, streams) for system in plan.systems for streams in plan.streams}
    with ExitStack() as residents, progress_of_parts(console) as progress:
        task = progress.add_task("", total=len(cells) * plan.runs)
        waiting: dict[System, MeasuredSystem] = {}
        for run in range(1, plan.runs + 1):
            # There and back again, so that a machine that slows down favours none.
            for system in plan.systems if run % 2 else reversed(plan.systems):
                with ExitStack() as passing:
                    process = waiting.get(system)
                    if process is None:
                        progress.update(task, description=f"run {run} of {plan.runs}: starting {system.kind}")
                        keeper = passing if system.kind == SERVED else residents
                        process = keeper.enter_context(start(system, checkpoint, max(LEAST_BATCH, *plan.streams)))
                        process.wait_until_ready()
                        for streams in plan.streams:
                            process.run(plan.warm_up(checkpoint, streams))
                        if system.kind != SERVED:
                            waiting[system] = process
                    for streams in plan.streams:
                        description = f"run {run} of {plan.runs}: {system.kind}, {streams} streams"
                        progress.update(task, description=description)
                        cells[system, streams].runs.append(process.run(plan.workload(checkpoint, streams, run)))
                        progress.advance(task)
    return list(cells.values())


def report(plan: Plan, checkpoint: BenchCheckpoint, cells: Sequence[Cell]) -> str:
    """The result as Markdown."""
    routing = "spread over the organs" if plan.spread and checkpoint.organs else "all of one organ"
    if not checkpoint.organs:
        routing = "one gate over all organs' experts"
    lines = [
        f"# Throughput and latency: {checkpoint.name.replace('_', ' ')}, {checkpoint.dtype}",
        "",
        describe(),
        f"{checkpoint.num_parameters / 1e6:.0f} M parameters, random weights. Prompts of {plan.prompt_tokens} tokens, "
        f"{plan.new_tokens} new tokens, greedy; {routing}. {plan.runs} runs after a warm-up, all systems in turn "
        "within each; medians, and the range of all runs. Ratios are taken within each run.",
    ]
    if found := ratios(cells):
        lines += ["", *ratio_table(found)]
    lines += [
        "",
        *cell_table(cells),
        "",
        "Decode: tokens of all streams while all of them decode. Prefill: all prompt tokens over the time until the "
        "last stream has its first token. First token and between tokens: over all streams of all runs.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints and writes the result."""
    options = _options()
    if _folder(options):
        check_drawing()
    exit_on_sigterm()
    console = Console(stderr=options.json)
    plan = Plan(
        systems=tuple(System.parse(text) for text in options.systems.split(",")),
        streams=tuple(int(text) for text in options.concurrency.split(",")),
        runs=options.runs,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        spread=options.spread,
    )
    checkpoint = checkpoint_with_progress(options.config, options.dtype, options.configs, options.checkpoints, console)
    try:
        cells = measure(plan, checkpoint, console)
    except SystemFailedError as error:
        sys.exit(f"a measured system failed:\n{error}")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing was written")
    text = report(plan, checkpoint, cells)
    values = {
        "machine": describe(),
        "config": checkpoint.name,
        "dtype": checkpoint.dtype,
        "prompt_tokens": plan.prompt_tokens,
        "new_tokens": plan.new_tokens,
        "spread": plan.spread,
        "cells": [cell.to_json() for cell in cells],
        "targets": [ratio.to_json() for ratio in ratios(cells)],
    }
    options.output = _folder(options)
    if options.output is None:
        show_result(text, values, console, as_json=options.json)
        return
    name = f"throughput_{checkpoint.name}_{checkpoint.dtype}{'_spread' if plan.spread else ''}"
    picture = keep_result(name, text, values, options, console, "throughput and latency")
    plot_throughput(cells, f"{checkpoint.name.replace('_', ' ')}, {checkpoint.dtype}", picture)


def _folder(options: argparse.Namespace) -> Path | None:
    """Where results go: a part of the measurement must not replace the whole one's."""
    if options.output is not None:
        return Path(options.output)
    whole = options.systems == _SYSTEMS and options.concurrency == _CONCURRENCY and not options.quick
    return RESULTS if whole else None


_SYSTEMS = ",".join((SERVED, ENGINE, GENERATE))
_CONCURRENCY = "1,4,8,16,32"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--config", default="4_experts", help="config_<name>.json (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of all weights (default: %(default)s)")
    parser.add_argument(
        "--systems", default=_SYSTEMS, help="which, each with :THREADS if you like (default: %(default)s)"
    )
    parser.add_argument("--concurrency", default=_CONCURRENCY, help="streams at once (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="of everything (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each stream (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each stream (default: %(default)s)")
    parser.add_argument("--spread", action="store_true", help="spread the streams over the organs")
    parser.add_argument("--quick", action="store_true", help="one run with 16 new tokens, not written down")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, help="folder for the results, of a part of the measurement too")
    options = parser.parse_args()
    if options.quick:
        options.runs, options.new_tokens = 1, 16
    return options


if __name__ == "__main__":
    main()
