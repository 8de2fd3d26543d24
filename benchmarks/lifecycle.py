"""Loads, calls and unloads bundles from many threads concurrently: `python -m benchmarks.lifecycle`.

One expert group in a process of its own, reached as Routers and Control reach it: threads load one of several versions
of the demo's experts, send exchanges to it, compare the outputs with the reference kernel's, and unload it, while the
others do the same; there is room for some of the versions only. After every sixteenth of the cycles all wait for each
other, everything is unloaded, and the process's memory is noted. 32 threads of 1,024 cycles each are what Triton's
own lifecycle test does. Writes `benchmarks/results/lifecycle.md`, `.json` and `.png`, unless it was cut short.
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import torch
from rich.console import Console

from benchmarks.drawing import check_drawing, new_figure, save_figure
from benchmarks.lifecycle_callers import TOLERANCE, Caller, HangingError, Question, Tally
from benchmarks.machine import describe
from benchmarks.measure_table import measure_table
from benchmarks.swap_operations import write_version
from benchmarks.systems.protocol import MeasuredSystem, SystemFailedError, exit_on_sigterm
from benchmarks.terminal import add_result_options, keep_result, progress_of_parts
from echovlm_ray.checkpoint.demo import make_demo
from echovlm_ray.checkpoint.layout import read_index, registry_root
from echovlm_ray.config import Config, ModelSection
from echovlm_ray.serving.cluster.settings import expert_application, settings_of
from echovlm_ray.serving.deploy.replica import environment_of
from experts.bundles.bundle import Bundle
from experts.kernels.registry import get_kernel
from experts.registry.registry import Registry

ORGAN = "heart"
NUM_VERSIONS, ROOM_FOR = 6, 4
ROUNDS = 16
TOKENS = (1, 3, 17)
SEED = 11
TARGET_GROWTH = 0.05
# Rounds whose memory is not compared: threads, connections and the allocator's heap come to be.
WARM_UP_ROUNDS = 2
STACKS_S, STACK_LINES = 1.0, 400
MIB = 1024 * 1024


class LifecycleError(RuntimeError):
    """The group broke its contract; the text says how."""


@dataclass(frozen=True, slots=True)
class Findings:
    """One run.

    Attributes:
        tally: what the callers met with.
        memory: resident bytes of the process with nothing loaded: before the first round, and after each.
        seconds: of all rounds.
        versions: how many there are.
        bundle_bytes: of the weights of one of them.
    """

    threads: int
    cycles: int
    tally: Tally
    memory: Sequence[int]
    seconds: float
    versions: int
    bundle_bytes: int

    @property
    def growth(self) -> float:
        """Memory after the last rounds ÷ memory after the first ones past the warm-up, less 1."""
        after = list(self.memory[1:])
        kept = after[min(WARM_UP_ROUNDS, len(after) - 1) :]
        some = max(1, len(kept) // 4)
        return statistics.median(kept[-some:]) / statistics.median(kept[:some]) - 1

    @property
    def ok(self) -> bool:
        """Whether all was as it must be; memory apart."""
        tally = self.tally
        whole = tally.cycles == self.threads * self.cycles
        return whole and not (tally.wrong or tally.unequal or tally.failures)

    def to_json(self) -> dict[str, Any]:
        """The numbers."""
        tally = self.tally
        return {
            "threads": self.threads,
            "cycles_per_thread": self.cycles,
            "cycles": tally.cycles,
            "outputs": tally.outputs,
            "wrong": tally.wrong,
            "unequal": tally.unequal,
            "refusals": dict(tally.refusals),
            "failures": tally.failures,
            "longest_s": tally.longest_s,
            "memory_bytes": list(self.memory),
            "memory_growth": self.growth,
            "seconds": self.seconds,
            "versions": self.versions,
            "bundle_bytes": self.bundle_bytes,
        }


def write_versions(registry: Registry, source: Bundle, work: Path) -> list[Bundle]:
    """Pushes versions with other weights into a registry."""
    bundles = []
    for number in range(NUM_VERSIONS):
        folder = work / f"version-{number}"
        write_version(folder, source, f"1.{number}.0", number)
        bundles.append(registry.open(registry.push(folder).digest))
    return bundles


def questions_of(bundles: Sequence[Bundle]) -> list[Question]:
    """For every version, layer and number of tokens one exchange, with the reference kernel's output.

    Raises:
        LifecycleError: two versions give the same output, so a mix-up would not be detected.
    """
    generator = torch.Generator().manual_seed(SEED)
    kernel = get_kernel("reference")
    manifest = bundles[0].manifest
    questions = []
    for layer in range(manifest.num_layers):
        prepared = [kernel.load(bundle.load_layer(layer)) for bundle in bundles]
        for tokens in TOKENS:
            x_TD = torch.randn(tokens, manifest.hidden_size, generator=generator).to(manifest.torch_dtype)
            index_TK = torch.rand(tokens, manifest.num_experts, generator=generator).argsort(1)[:, :2].int()
            weight_TK = torch.rand(tokens, 2, generator=generator).to(manifest.torch_dtype)
            outputs = [experts.forward(x_TD, index_TK, weight_TK) for experts in prepared]
            asked = [
                Question.of(bundle.digest, layer, x_TD, index_TK, weight_TK, output_TD)
                for bundle, output_TD in zip(bundles, outputs, strict=True)
            ]
            if any(
                question.is_answered_by(output_TD)
                for own, question in enumerate(asked)
                for other, output_TD in enumerate(outputs)
                if own != other
            ):
                raise LifecycleError("two versions give the same output: their weights must differ more")
            questions += asked
    return questions


def stress(
    address: str,
    pid: int,
    questions: Sequence[Question],
    threads: int,
    cycles: int,
    progress: Callable[[int], None] = lambda cycles: None,
) -> tuple[Tally, list[int], float]:
    """Runs all cycles; what was met with, the memory after every round, and the seconds that it took.

    Raises:
        HangingError: a call or a cycle does not come to an end.
        LifecycleError: something is left behind when all is unloaded.
        grpc.RpcError: a call failed in a way that it must not.
    """
    tally = Tally()
    rounds = min(ROUNDS, cycles)
    callers = [Caller(number, address, questions, tally) for number in range(threads)]
    process = psutil.Process(pid)
    memory = [process.memory_info().rss]
    errors: list[Exception] = []

    def run(caller: Caller, count: int) -> None:
        try:
            for _ in range(count):
                if errors:
                    return
                caller.cycle()
        except Exception as error:
            # Also unexpected exceptions: without this the round would appear successful.
            errors.append(error)

    began = time.monotonic()
    for number in range(rounds):
        count = cycles * (number + 1) // rounds - cycles * number // rounds
        running = [threading.Thread(target=run, args=(caller, count), daemon=True) for caller in callers]
        for thread in running:
            thread.start()
        while any(thread.is_alive() for thread in running):
            time.sleep(0.1)
            progress(tally.cycles)
        if errors:
            raise errors[0]
        check_empty(callers[0], questions)
        memory.append(process.memory_info().rss)
    seconds = time.monotonic() - began
    for caller in callers:
        caller.close()
    return tally, memory, seconds


def check_empty(caller: Caller, questions: Sequence[Question]) -> None:
    """Unloads everything, and checks that nothing is left.

    Raises:
        LifecycleError: something is.
    """
    for digest in {question.digest for question in questions}:
        caller.unload(digest)
    status = caller.status()
    if status.bundles or status.loading or status.exchanges_in_flight:
        raise LifecycleError(
            f"after all was unloaded {len(status.bundles)} bundles are resident, {len(status.loading)} are being "
            f"loaded and {status.exchanges_in_flight} exchanges are under way"
        )


def table(found: Findings) -> list[str]:
    """The measures as lines of Markdown."""
    tally = found.tally
    longest = ", ".join(f"{kind} {seconds * 1e3:.0f}" for kind, seconds in sorted(tally.longest_s.items()))
    rows: list[tuple[str, str, str]] = [
        ("cycles that came to their end", f"{tally.cycles:,}", f"{found.threads * found.cycles:,}"),
        ("calls that hang", "0", "0"),
        (f"outputs that are not the reference's, of {tally.outputs:,}", str(tally.wrong), "0"),
        ("outputs of the same exchange with other bits than before", str(tally.unequal), "0"),
        ("failures", str(len(tally.failures)), "0"),
        *((f"refused, and rightly so: {why}", f"{count:,}", "") for why, count in sorted(tally.refusals.items())),
        ("longest call, ms", longest, ""),
        ("cycles a second", f"{tally.cycles / found.seconds:.0f}", ""),
        (
            "resident memory with nothing loaded: before, after the first round, at the end, MiB",
            ", ".join(f"{found.memory[place] / MIB:.0f}" for place in (0, 1, -1)),
            "",
        ),
        ("growth of it after the warm-up", f"{found.growth:+.1%}", f"≤ {TARGET_GROWTH:.0%}"),
    ]
    return measure_table(rows)


def plot(found: Findings, path: Path) -> None:
    """Memory over the cycles."""
    figure = new_figure(figsize=(8, 4.5))
    (axis,) = figure.axes
    rounds = len(found.memory) - 1
    cycles = [found.threads * found.cycles * done // rounds for done in range(rounds + 1)]
    axis.plot(cycles, [sample / MIB for sample in found.memory], marker="o")
    axis.set_xlabel("cycles of load, exchanges, unload")
    axis.set_ylabel("resident memory with nothing loaded, MiB")
    axis.set_ylim(bottom=0)
    axis.set_title(f"{found.threads} threads, one expert group")
    save_figure(figure, path)


def environment(checkpoint: Path) -> Mapping[str, str]:
    """The environment of a served expert group's process."""
    config = Config(model=ModelSection(checkpoint=checkpoint, torch_threads=1, device="cpu"))
    return environment_of(settings_of(config, (ORGAN,), "loopback")[expert_application(ORGAN)])


def measure(options: argparse.Namespace, work: Path, console: Console) -> Findings:
    """Makes the versions, starts the group, and runs all cycles."""
    make_demo(work / "demo")
    source = Registry(registry_root(work / "demo")).open(read_index(work / "demo").entry(ORGAN).bundle_digest)
    registry = Registry(work / "registry")
    bundles = write_versions(registry, source, work)
    manifest = source.manifest
    bundle_bytes = manifest.num_expert_parameters * manifest.torch_dtype.itemsize
    questions = questions_of(bundles)
    # A kernel may pad, so half a version more.
    limit = round((ROOM_FOR + 0.5) * bundle_bytes)
    arguments = ["-m", "benchmarks.lifecycle_group", str(work / "registry"), ORGAN, str(limit)]
    with (
        MeasuredSystem(arguments, dict(environment(work / "demo"))) as group,
        progress_of_parts(console) as progress,
    ):
        task = progress.add_task("cycles", total=options.threads * options.cycles)
        ready = group.wait_until_ready()
        try:
            tally, memory, seconds = stress(
                ready["address"],
                ready["pid"],
                questions,
                options.threads,
                options.cycles,
                lambda done: progress.update(task, completed=done),
            )
        except HangingError as error:
            os.kill(ready["pid"], signal.SIGUSR1)
            time.sleep(STACKS_S)
            raise LifecycleError(f"{error}\n{group.log_tail(STACK_LINES)}") from None
    return Findings(options.threads, options.cycles, tally, memory, seconds, len(bundles), bundle_bytes)


def main() -> None:
    """Measures, prints and writes the result."""
    options = _options()
    check_drawing()
    exit_on_sigterm()
    torch.set_num_threads(1)
    console = Console(stderr=options.json)
    try:
        with tempfile.TemporaryDirectory(prefix="echovlm-lifecycle-") as name:
            found = measure(options, Path(name), console)
    except (LifecycleError, SystemFailedError) as error:
        sys.exit(f"failed: {error}")
    except grpc.RpcError as error:
        sys.exit(f"a call failed: {error.code().name}: {error.details()}")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing was written")
    text = "\n".join(
        [
            f"# {found.threads} threads × {found.cycles:,} cycles of load, exchanges and unload on one expert group",
            "",
            describe(),
            f"One process, reached over gRPC; {found.versions} versions of {found.bundle_bytes / MIB:.1f} MiB, room "
            f"for {ROOM_FOR}. Outputs are compared with the reference kernel's, up to {TOLERANCE:g} of the largest "
            "one, and with all others of the same exchange, bit for bit. What one thread loads another may unload: an "
            "exchange is then refused, and its cycle begins again. `python -m benchmarks.lifecycle`.",
            "",
            *table(found),
            "",
        ]
    )
    values = {"machine": describe(), **found.to_json()}
    plot(found, keep_result("lifecycle", text, values, options, console, "memory"))
    if not found.ok or found.growth > TARGET_GROWTH:
        sys.exit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=32, help="that call at once (default: %(default)s)")
    parser.add_argument("--cycles", type=int, default=1024, help="of each thread (default: %(default)s)")
    add_result_options(parser)
    options = parser.parse_args()
    if options.threads < 1 or options.cycles < 1:
        parser.error("--threads and --cycles must be at least 1")
    return options


if __name__ == "__main__":
    main()
