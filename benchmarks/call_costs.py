"""What checking every call costs: `python -m benchmarks.call_costs`.

Two measurements. A call of a server with its token, limits and request id, over the same call of a bare `grpc.aio`
server: unary, and for each message of a stream. And, with `--before CHECKOUT`, tokens a second of the served system
over those of another checkout of this repository, for example of the commit before checks were added; both in turn,
with the libraries of this one. Writes `benchmarks/results/call_costs.md`.
"""

import argparse
import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
from rich.console import Console

from benchmarks.call_costs_peers import TOKEN
from benchmarks.checkpoints import BenchCheckpoint, add_options, checkpoint_with_progress
from benchmarks.machine import describe
from benchmarks.systems.protocol import ROOT, MeasuredSystem, SystemFailedError, exit_on_sigterm
from benchmarks.terminal import progress_of_parts
from benchmarks.workload import random_workload
from echovlm_ray.config import Config
from echovlm_ray.serving.cluster.settings import GATEWAY, settings_of
from echovlm_ray.serving.deploy.replica import environment_of
from protos import echovlm_pb2, echovlm_pb2_grpc

RESULT = Path(__file__).resolve().parent / "results" / "call_costs.md"
CALLS, WARM_UP = 1000, 200
STREAMS, MESSAGES = 8, 500
PROMPT_TOKENS, WARM_UP_TOKENS = 32, 16
KINDS = ("bare", "ours")
MAX_CALL_RATIO, MIN_DECODE_RATIO = 1.5, 0.98
MAX_BATCH_SIZE = 32

# Microseconds of a unary call, and of each message of a stream.
Costs = tuple[float, float]


@contextmanager
def server(kind: str, token_file: Path) -> Iterator[str]:
    """The address of a server in a separate process with a gateway's environment; see `call_costs_peers`."""
    environment = os.environ | environment_of(settings_of(Config(), (), network="loopback")[GATEWAY])
    command = [sys.executable, "-m", "benchmarks.call_costs_peers", kind, str(token_file)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def measure_calls(address: str, calls: int = CALLS, streams: int = STREAMS) -> Costs:
    """Medians over calls that follow each other."""
    metadata = (("authorization", f"Bearer {TOKEN}"),)
    request = echovlm_pb2.GenerateRequest(prompt="x" * 100, max_new_tokens=MESSAGES)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = echovlm_pb2_grpc.EchoVLMStub(channel)
        unary, streaming = [], []
        for _ in range(WARM_UP + calls):
            began = time.perf_counter()
            await stub.Generate(request, metadata=metadata)
            unary.append(time.perf_counter() - began)
        for _ in range(streams):
            began = time.perf_counter()
            async for _ in stub.GenerateStream(request, metadata=metadata):
                pass
            streaming.append((time.perf_counter() - began) / MESSAGES)
    return 1e6 * statistics.median(unary[WARM_UP:]), 1e6 * statistics.median(streaming)


def call_costs(runs: int, advance: Callable[[], object]) -> dict[str, list[Costs]]:
    """Of every kind of server in turn, in every run again."""
    found: dict[str, list[Costs]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        token_file = Path(folder) / "tokens"
        token_file.touch(0o600)
        token_file.write_text(f"{TOKEN}\n")
        for run in range(runs):
            for kind in KINDS if run % 2 else reversed(KINDS):
                with server(kind, token_file) as address:
                    found[kind].append(asyncio.run(measure_calls(address)))
                advance()
    return found


def decode_rates(
    checkouts: dict[str, Path],
    checkpoint: BenchCheckpoint,
    streams: tuple[int, ...],
    runs: int,
    new_tokens: int,
    advance: Callable[[], object],
) -> dict[str, dict[int, list[float]]]:
    """Tokens a second of each checkout's served system: by checkout and streams, those of all runs.

    Raises:
        SystemFailedError: one of them failed.
    """
    found = {name: {count: list[float]() for count in streams} for name in checkouts}
    arguments = ["-m", "benchmarks.systems.served", "--threads", "1", "--max-batch-size", str(MAX_BATCH_SIZE)]

    def rate(system: MeasuredSystem, count: int, tokens: int, seed: str) -> float:
        workload = random_workload(
            count,
            prompt_tokens=PROMPT_TOKENS,
            new_tokens=tokens,
            vocab_size=checkpoint.config["vocab_size"],
            organs=checkpoint.organs[:1],
            seed=f"{seed}, {count} streams",
        )
        return system.run(workload).decode_tokens_per_s

    with ExitStack() as stack:
        # Every system stores the state of its rollouts next to its checkpoint.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=checkpoint.split.parent)))
        systems = {}
        for name, root in checkouts.items():
            shutil.copytree(
                checkpoint.split, folder / name, copy_function=os.link, ignore=shutil.ignore_patterns("rollouts")
            )
            # Ray's workers find the packages by it too.
            environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
            systems[name] = stack.enter_context(
                MeasuredSystem([*arguments, "--checkpoint", str(folder / name)], environment, root=root)
            )
            systems[name].wait_until_ready()
            for count in streams:
                rate(systems[name], count, WARM_UP_TOKENS, "warm-up")
        for run in range(runs):
            # There and back again, so that a machine that slows down favours none.
            for name in checkouts if run % 2 else reversed(checkouts):
                for count in streams:
                    found[name][count].append(rate(systems[name], count, new_tokens, f"run {run}"))
                advance()
    return found


def call_table(found: dict[str, list[Costs]]) -> list[str]:
    """Medians over the runs; ratios are taken within each run."""
    lines = ["| | bare `grpc.aio`, µs | with checks, µs | ratio | |", "| --- | ---: | ---: | ---: | --- |"]
    for title, at in (("unary call", 0), ("message of a stream", 1)):
        bare, ours = ([costs[at] for costs in found[kind]] for kind in KINDS)
        ratio = statistics.median(mine / its for mine, its in zip(ours, bare, strict=True))
        verdict = "" if at else verdict_of(ratio <= MAX_CALL_RATIO, f"≤ {MAX_CALL_RATIO}")
        row = f"{statistics.median(bare):.0f} | {statistics.median(ours):.0f} | {ratio:.2f} | {verdict}"
        lines.append(f"| {title} | {row} |")
    return lines


def decode_table(found: dict[str, dict[int, list[float]]], before: str, after: str) -> list[str]:
    """Medians over the runs; ratios are taken within each run."""
    lines = [
        f"| streams | `{before}`, tokens/s | `{after}`, tokens/s | ratio | all runs | |",
        "| ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for count, rates in found[before].items():
        ratios = [mine / its for mine, its in zip(found[after][count], rates, strict=True)]
        ratio = statistics.median(ratios)
        medians = " | ".join(f"{statistics.median(found[name][count]):.1f}" for name in (before, after))
        verdict = verdict_of(ratio >= MIN_DECODE_RATIO, f"≥ {MIN_DECODE_RATIO}")
        lines.append(f"| {count} | {medians} | {ratio:.3f} | {min(ratios):.3f} to {max(ratios):.3f} | {verdict} |")
    return lines


def verdict_of(reached: bool, target: str) -> str:
    """How a target is named."""
    return f"{target}: {'reached' if reached else '**missed**'}"


def revision(checkout: Path) -> str:
    """What a checkout is of."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Measures, prints, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--before", type=Path, help="another checkout, to compare tokens a second with")
    parser.add_argument("--runs", type=int, default=5, help="of the calls (default: %(default)s)")
    parser.add_argument("--decode-runs", type=int, default=12, help="of the decoding (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=96, help="of each stream (default: %(default)s)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8], help="at once (default: 1 8)")
    options = parser.parse_args()
    exit_on_sigterm()
    console = Console()
    lines = ["# What checking every call costs", "", describe(), ""]
    lines.append("Both sides in turn within each run; medians of the runs. Ratios are taken within each run.")
    try:
        with progress_of_parts(console) as progress:
            task = progress.add_task("calls", total=2 * options.runs)
            calls = call_costs(options.runs, lambda: progress.advance(task))
        title = "A call with its token, limits and request id, over one that nothing is checked of"
        lines += ["", f"{title} ({options.runs} runs):", ""]
        lines += call_table(calls)
        if options.before is not None:
            checkpoint = checkpoint_with_progress(
                "4_experts", "bfloat16", options.configs, options.checkpoints, console
            )
            checkouts = {revision(root): root for root in (options.before.absolute(), ROOT)}
            with progress_of_parts(console) as progress:
                task = progress.add_task("decoding", total=2 * options.decode_runs)
                rates = decode_rates(
                    checkouts,
                    checkpoint,
                    tuple(options.streams),
                    options.decode_runs,
                    options.new_tokens,
                    lambda: progress.advance(task),
                )
            title = "Decoding of two commits, the second with the system's secret in every call between the parts"
            model = f"{checkpoint.name.replace('_', ' ')}, {checkpoint.dtype}"
            lines += ["", f"{title} ({model}, {options.decode_runs} runs, both systems up):", ""]
            lines += decode_table(rates, *checkouts)
    except SystemFailedError as error:
        sys.exit(f"a measured system failed:\n{error}")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing was written")
    text = "\n".join(lines) + "\n"
    console.print(text, markup=False, soft_wrap=True)
    RESULT.write_text(text)


if __name__ == "__main__":
    main()
