"""What one dispatch to an expert group costs: `python -m benchmarks.dispatch`.

Tokens go to an expert group in another process, whose kernel gives them back, and return: with shared memory, in the
messages over TCP, over raw gRPC, and between two processes that share memory and wake each other through an eventfd,
which is what cannot be beaten. All take turns in one run. Writes `benchmarks/results/dispatch.md` and `dispatch.png`.
"""

import argparse
import json
import mmap
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.dispatch_peers import HIDDEN_SIZE, ORGAN, STREAM_METHOD, pin
from benchmarks.drawing import check_drawing, new_figure, save_figure
from benchmarks.machine import describe
from benchmarks.timings import nearest_rank
from echovlm_ray.config import Config
from echovlm_ray.serving.cluster.settings import ROUTER, settings_of
from echovlm_ray.serving.deploy.replica import environment_of
from router.dispatch.remote import RemoteExperts

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = Path(__file__).resolve().parent.parent
SIZES = {"8 KiB": 8 * 1024, "64 KiB": 64 * 1024, "512 KiB": 512 * 1024, "8 MiB": 8 * 1024**2}
SHARED, INLINE, STREAM, FLOOR = "shared memory", "inline over TCP", "raw gRPC stream over TCP", "eventfd"
WAYS = (SHARED, INLINE, STREAM, FLOOR)
TARGETS = {"64 KiB": 2.5, "8 MiB": 1.3}
PLACES = {
    "apart": "Each of the two processes on a core of its own",
    "free": "Where the scheduler puts them",
}
# One way is measured so often before it is the next one's turn: often enough to be warm.
TURN = 25
WARM_UP = 5
TOP_K = 2

Dispatch = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Measured:
    """Microseconds of every round trip of one size."""

    place: str
    size: str
    microseconds: dict[str, list[float]]

    def percentile(self, way: str, percent: float) -> float:
        """Of one way."""
        return nearest_rank(self.microseconds[way], percent)

    def ratio(self, way: str) -> float:
        """p50 over that of the floor."""
        return self.percentile(way, 50) / self.percentile(FLOOR, 50)


@contextmanager
def peer(kind: str, core: int | None, *arguments: str, descriptors: tuple[int, ...] = ()) -> Iterator[str]:
    """Runs the other process; its output when it is ready."""
    command = [sys.executable, "-m", "benchmarks.dispatch_peers", kind, *arguments]
    if core is not None:
        command += ["--core", str(core)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, cwd=ROOT, pass_fds=descriptors
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline().strip()
            if not said:
                raise RuntimeError(f"the {kind} process ended with {process.wait()}")
            yield said
        finally:
            process.kill()


@contextmanager
def expert_group(core: int | None, shared_memory_bytes: int) -> Iterator[Dispatch]:
    """This system's dispatch."""
    with peer("experts", core) as said:
        address, digest = said.split()
        experts = RemoteExperts(
            lambda organ: [address], exchange_timeout_s=30.0, shared_memory_bytes=shared_memory_bytes
        )
        experts.wait_until_connected([ORGAN], 30.0)
        choices: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def dispatch(x_TD: torch.Tensor) -> torch.Tensor:
            tokens = x_TD.shape[0]
            if tokens not in choices:
                choices[tokens] = torch.zeros(tokens, TOP_K, dtype=torch.int64), torch.ones(tokens, TOP_K)
            return experts.send(ORGAN, digest, 0, x_TD, *choices[tokens]).result()

        yield dispatch
        experts.close()


@contextmanager
def raw_stream(core: int | None) -> Iterator[Dispatch]:
    """gRPC's synchronous client and its aio server, with raw bytes only."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with peer("stream", core) as address, grpc.insecure_channel(address, options=options) as channel:
        requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        responses = channel.stream_stream(STREAM_METHOD)(iter(requests.get, None))

        def dispatch(x_TD: torch.Tensor) -> torch.Tensor:
            requests.put(x_TD.numpy().tobytes())
            return torch.frombuffer(next(responses), dtype=x_TD.dtype).view(x_TD.shape)

        yield dispatch
        requests.put(None)


@contextmanager
def eventfd_pair(core: int | None) -> Iterator[Dispatch]:
    """Shared memory and two eventfds between two processes that do nothing but block."""
    size = max(SIZES.values())
    memory = os.memfd_create("dispatch-floor")
    os.ftruncate(memory, 2 * size)
    ask, answer = os.eventfd(0), os.eventfd(0)
    descriptors = (memory, ask, answer)
    arguments = ("--size", str(size), "--descriptors", *map(str, descriptors))
    octets = torch.frombuffer(mmap.mmap(memory, 2 * size), dtype=torch.uint8)
    with peer("eventfd", core, *arguments, descriptors=descriptors):

        def dispatch(x_TD: torch.Tensor) -> torch.Tensor:
            octets[: x_TD.nbytes].view(x_TD.dtype).view(x_TD.shape).copy_(x_TD)
            os.eventfd_write(ask, 1 + x_TD.nbytes)
            os.eventfd_read(answer)
            return octets[size : size + x_TD.nbytes].view(x_TD.dtype).view(x_TD.shape)

        yield dispatch
    for descriptor in descriptors:
        os.close(descriptor)


def measure(place: str, repetitions: int, progress: Progress) -> list[Measured]:
    """All sizes and ways in turn."""
    cores = sorted(os.sched_getaffinity(0))
    if place == "apart" and len(cores) < 2:
        return []
    here, there = (cores[0], cores[1]) if place == "apart" else (None, None)
    pin(here)
    found = []
    try:
        with ExitStack() as stack, torch.inference_mode():
            ways = dict(
                zip(
                    WAYS,
                    (
                        stack.enter_context(expert_group(there, 256 * 1024**2)),
                        stack.enter_context(expert_group(there, 0)),
                        stack.enter_context(raw_stream(there)),
                        stack.enter_context(eventfd_pair(there)),
                    ),
                    strict=True,
                )
            )
            for size, nbytes in SIZES.items():
                x_TD = torch.randn(nbytes // (4 * HIDDEN_SIZE), HIDDEN_SIZE)
                found.append(_measure_size(place, size, x_TD, ways, repetitions, progress))
    finally:
        os.sched_setaffinity(0, cores)
    return found


def _measure_size(
    place: str, size: str, x_TD: torch.Tensor, ways: dict[str, Dispatch], repetitions: int, progress: Progress
) -> Measured:
    times: dict[str, list[float]] = {way: [] for way in ways}
    for way, dispatch in ways.items():
        if not torch.equal(dispatch(x_TD), x_TD):
            raise RuntimeError(f"{way} gave something else back than it got")
    for _ in progress.track(range(max(1, repetitions // TURN)), description=f"{size}, {place}"):
        for way, dispatch in ways.items():
            for turn in range(WARM_UP + TURN):
                started = time.perf_counter()
                output_TD = dispatch(x_TD)
                elapsed = time.perf_counter() - started
                del output_TD
                if turn >= WARM_UP:
                    times[way].append(elapsed * 1e6)
    return Measured(place, size, times)


def markdown(found: list[Measured], load: tuple[float, float]) -> str:
    """The result file's text; `load` is the machine's load average over a minute, before and after."""
    lines = [
        "# One dispatch to an expert group and back",
        "",
        describe(),
        "Round trips of float32 tokens of 1,024 numbers between two processes, the way of `RemoteExperts.send` to "
        "`result` with a kernel that gives back what it gets; `python -m benchmarks.dispatch`. Microseconds. × is the "
        "p50 over that of *eventfd*: two processes that block, share memory, copy the tokens in and the answer over as "
        "the dispatch does, and wake each other through an eventfd. Nothing that wakes another process is faster. Left "
        "to itself the scheduler often puts those two on one core, where waking takes a tenth, but nothing could "
        "overlap.",
        "",
        f"Load average of the machine before and after: {load[0]:.1f} and {load[1]:.1f}. Well above 1, other processes "
        "had the cores as well, and ways with more instructions lose more by that.",
    ]
    for place, title in PLACES.items():
        rows = [measured for measured in found if measured.place == place]
        if not rows:
            continue
        lines += [
            "",
            f"## {title}",
            "",
            "| size | " + " | ".join(f"{way}, p50 | p99" for way in WAYS) + " | shared × | inline × | raw gRPC × | |",
            "| ---: " * (2 * len(WAYS) + 5) + "|",
        ]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    lines += ["", "![p50 by size](dispatch.png)"]
    return "\n".join(lines) + "\n"


def _cells(row: Measured) -> list[str]:
    times = [f"{row.percentile(way, percent):,.0f}" for way in WAYS for percent in (50, 99)]
    ratios = [f"{row.ratio(way):.2f}" for way in WAYS[:-1]]
    verdict = ""
    if row.size in TARGETS and row.place == "apart":
        target = TARGETS[row.size]
        verdict = f"≤ {target}: " + ("met" if row.ratio(SHARED) <= target else "**missed**")
    return [row.size, *times, *ratios, verdict]


def as_json(found: list[Measured]) -> str:
    """The same for programs."""
    rows = [
        {
            "place": row.place,
            "size": row.size,
            **{
                way: {"p50_us": row.percentile(way, 50), "p99_us": row.percentile(way, 99), "ratio": row.ratio(way)}
                for way in WAYS
            },
        }
        for row in found
    ]
    return json.dumps(rows, indent=2)


def plot(found: list[Measured], path: Path) -> None:
    """p50 by size, one panel for each place."""
    places = [place for place in PLACES if any(row.place == place for row in found)]
    figure = new_figure(len(places), figsize=(5.5 * len(places), 4.2), sharey=True)
    for panel, place in zip(figure.axes, places, strict=True):
        rows = [row for row in found if row.place == place]
        for way in WAYS:
            panel.plot([SIZES[row.size] for row in rows], [row.percentile(way, 50) for row in rows], "o-", label=way)
        panel.set(xscale="log", yscale="log", title=PLACES[place], xlabel="bytes each way")
        panel.set_xticks(list(SIZES.values()), list(SIZES))
    figure.axes[0].set_ylabel("round trip, p50, µs")
    figure.axes[0].legend()
    save_figure(figure, path)


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=1000, help="round trips of each kind (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of the result (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the numbers, and write nothing")
    options = parser.parse_args()
    if not options.json:
        check_drawing()
    # As the system's own processes run; gRPC reads it when it is loaded.
    wanted = environment_of(settings_of(Config(), (ORGAN,), "loopback")[ROUTER])
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.dispatch", *sys.argv[1:]], os.environ | wanted)
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    console = Console(stderr=options.json)
    with Progress(console=console) as progress:
        found = [row for place in PLACES for row in measure(place, options.repetitions, progress)]
    if options.json:
        print(as_json(found))
        return
    text = markdown(found, (load_before, os.getloadavg()[0]))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "dispatch.md").write_text(text)
    plot(found, options.output / "dispatch.png")
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
