"""Swapping an organ's experts under load: `python -m benchmarks.swaps`.

Starts a system on a copy of a checkpoint (the demo, unless another is named), lets streams ask without pause, and
replaces one organ's experts again and again: promoted at once, promoted after a canary, rolled back, and taken back
from a canary. After every four swaps the same load goes on for a while without any, so both are measured side by side.
Every answer is compared with the one that its version gives when there is no other request. Writes
`benchmarks/results/swaps_NAME.md`, `.json` and `.png`, unless it was cut short by Ctrl-C.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
from rich.console import Console

from benchmarks.drawing import check_drawing
from benchmarks.machine import describe
from benchmarks.running_parts import first_replicas
from benchmarks.swap_operations import (
    ControlWatch,
    ExpertsView,
    RouterView,
    Swap,
    SwapFailedError,
    Swapper,
    seconds_to_read,
    write_version,
)
from benchmarks.swap_report import Findings, plot, table
from benchmarks.swap_streams import Asked, Streams, ask
from benchmarks.systems.protocol import MeasuredSystem, SystemFailedError, exit_on_sigterm
from benchmarks.terminal import add_result_options, keep_result, progress_of_parts
from echovlm_ray.checkpoint.demo import make_demo
from echovlm_ray.checkpoint.layout import read_index, registry_root
from echovlm_ray.client import EchoVLMClient, EchoVLMError
from echovlm_ray.client.control import ExpertControlClient
from experts.bundles.bundle import Bundle
from experts.bundles.writer import link_or_copy
from experts.registry.registry import Registry

PROMPTS = ("What is shown?", "Describe the image.", "Is there flow?")
NUM_VERSIONS = 4
KINDS = len(Swapper.KINDS)


def measure(options: argparse.Namespace, checkpoint: Path, work: Path, console: Console) -> Findings:
    """Starts the system, pushes the versions, and swaps."""
    index = read_index(checkpoint)
    organs = [options.organ, *(entry.organ for entry in index.organs if entry.organ != options.organ)]
    source = Registry(registry_root(checkpoint)).open(index.entry(options.organ).bundle_digest)
    arguments = ["-m", "benchmarks.systems.gateway", "--checkpoint", str(checkpoint)]
    with MeasuredSystem(arguments, {}) as system, progress_of_parts(console) as progress:
        task = progress.add_task("starting the system", total=options.swaps)
        ready = system.wait_until_ready()
        with ExitStack() as stack:
            control = stack.enter_context(ExpertControlClient(ready["control"]))
            watch = stack.enter_context(ControlWatch(control, options.organ))
            progress.update(task, description="pushing the versions")
            versions = push_versions(control, source, work)
            parts = first_replicas(ready["control"])
            router = stack.enter_context(RouterView(parts["router"].connect(), options.organ))
            experts = stack.enter_context(ExpertsView(parts[f"expert-{options.organ}"].connect()))
            swapper = Swapper(router, experts, control, watch, options.organ, versions)
            watched = ("router", "control", f"expert-{options.organ}")
            processes = {part: psutil.Process(parts[part].pid) for part in watched}
            # Half of the streams ask the organ that is swapped, the others each of the rest in turn.
            asked = [
                organs[0] if turn % 2 == 0 else organs[1 + turn // 2 % (len(organs) - 1)]
                for turn in range(options.streams)
            ]
            progress.update(task, description="every version's answers, alone")
            alone = answers_alone(ready["address"], swapper, versions, options, sorted(set(asked)))
            swaps: list[Swap] = []
            quiet: list[tuple[float, float]] = []
            read_s: list[float] = []
            memory: dict[str, list[int]] = {part: [] for part in processes}
            with Streams(ready["address"], asked, PROMPTS, options.new_tokens) as streams:
                time.sleep(options.settle)
                while len(swaps) < options.swaps:
                    began = time.monotonic()
                    for _ in range(min(KINDS, options.swaps - len(swaps))):
                        progress.update(task, description="swapping", completed=len(swaps))
                        read_s.append(seconds_to_read(source))
                        swaps.append(swapper.next())
                        for part, process in processes.items():
                            memory[part].append(process.memory_info().rss)
                    progress.update(task, description="without swaps", completed=len(swaps))
                    pause = time.monotonic()
                    time.sleep((pause - began) * options.quiet)
                    quiet.append((pause, time.monotonic()))
    bundle_bytes = sum(entry.size for entry in source.manifest.files)
    return Findings(options.organ, streams.heard, streams.failures, alone, swaps, quiet, memory, bundle_bytes, read_s)


def push_versions(control: ExpertControlClient, source: Bundle, work: Path) -> dict[str, str]:
    """Writes and pushes further versions; version → digest, the first one included."""
    versions = {source.manifest.version: source.digest}
    for number in range(1, NUM_VERSIONS):
        version = f"9.{number}.0"
        folder = work / version
        write_version(folder, source, version, number)
        versions[version] = control.push(folder).digest
    return versions


def answers_alone(
    server: str, swapper: Swapper, versions: dict[str, str], options: argparse.Namespace, organs: Sequence[str]
) -> dict[tuple[str, str, str], str]:
    """Organ, version and prompt → text, one question at a time; the first version is restored afterwards."""
    found: dict[tuple[str, str, str], str] = {}
    with EchoVLMClient(server) as client:
        for version in [*list(versions)[1:], next(iter(versions))]:
            swapper.serve(version)
            for organ in organs:
                for prompt in PROMPTS:
                    heard = ask(client, Asked(organ, prompt, options.new_tokens))
                    found[organ, heard.version, prompt] = heard.text
    return found


@contextmanager
def copied(checkpoint: Path | None) -> Iterator[tuple[Path, Path]]:
    """A copy of a checkpoint that may be written to, of the demo without one; and a folder for what is pushed."""
    with tempfile.TemporaryDirectory(prefix="echovlm-swaps-", dir=checkpoint and checkpoint.parent) as name:
        work = Path(name)
        copy = work / "checkpoint"
        if checkpoint is None:
            make_demo(copy)
        else:
            shutil.copytree(
                checkpoint,
                copy,
                # Rollouts of earlier runs are none of ours.
                ignore=shutil.ignore_patterns("rollouts"),
                copy_function=lambda source, target: link_or_copy(Path(source), Path(target)),
            )
        yield copy, work


def main() -> None:
    """Measures, prints and writes the result."""
    options = _options()
    check_drawing()
    exit_on_sigterm()
    console = Console(stderr=options.json)
    try:
        with copied(options.checkpoint and options.checkpoint.absolute()) as (checkpoint, work):
            found = measure(options, checkpoint, work, console)
    except (EchoVLMError, SystemFailedError, SwapFailedError) as error:
        sys.exit(f"the system failed: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing was written")
    what = options.checkpoint.parent.name if options.checkpoint else "the demo"
    kinds = ", ".join(Swapper.KINDS)
    text = "\n".join(
        [
            f"# {len(found.swaps)} swaps of one organ's experts under load",
            "",
            describe(),
            f"Checkpoint: {what}; {options.streams} streams without pause, half of them of {options.organ}, whose "
            f"experts are replaced ({kinds}, in turn); {options.new_tokens} new tokens an answer, greedy. After every "
            f"{KINDS} swaps the same load without any. `python -m benchmarks.swaps`.",
            "",
            *table(found),
            "",
        ]
    )
    values = {"machine": describe(), **found.to_json()}
    name = f"swaps_{options.name or what.replace(' ', '_').removeprefix('the_')}"
    picture = keep_result(name, text, values, options, console, "pauses and memory")
    plot(found, f"{len(found.swaps)} swaps, {options.streams} streams, {what}", picture)
    for failure in found.failures[:10]:
        console.print(failure, style="red", markup=False)
    if found.failures or found.mismatches:
        sys.exit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a split folder, which stays as it is (default: the demo)")
    parser.add_argument("--organ", default="heart", help="whose experts are replaced (default: %(default)s)")
    parser.add_argument("--swaps", type=int, default=50, help="how often (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=8, help="that ask meanwhile (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="of every answer (default: %(default)s)")
    parser.add_argument(
        "--settle", type=float, default=5.0, help="seconds before the first swap (default: %(default)s)"
    )
    parser.add_argument(
        "--quiet", type=float, default=0.5, help="time without swaps, for each second of them (default: %(default)s)"
    )
    parser.add_argument("--name", help="of the result files (default: the checkpoint's)")
    add_result_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
