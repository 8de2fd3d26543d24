"""Start and memory of the demo beside their floor: `python -m benchmarks.first_answer`.

Runs the installed system as a user does, on the default ports, with the demo checkpoint; asks for a report on a real
echocardiogram; and compares it with as many empty replicas on the same Ray (`benchmarks.empty_system`), each started in
turn on the same machine. A further start notes what every part imports (`-X importtime`). Writes
`benchmarks/results/first_answer.md`.

Install what `make serve` does and no more, as packages beside them that Ray imports where it finds them, pandas first
of all, count in both systems.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil
from pydicom.data import get_testdata_file
from rich.console import Console

from benchmarks.import_profile import ImportProfile, profile_of_worker
from benchmarks.machine import describe
from benchmarks.process_memory import ProcessMemory, memory_below
from echovlm_ray.client import EchoVLMClient, EchoVLMError, Text

ROOT = Path(__file__).resolve().parent.parent
ECHORAY = Path(sys.executable).with_name("echoray")
CHECKPOINT = ROOT / "checkpoints" / "demo"
RESULT = ROOT / "benchmarks" / "results" / "first_answer.md"
EXPERT = "expert-"
# What the process that the user starts is called, and the one below it that talks to Ray.
COMMAND = "the command"
MAX_EXPERT_RATIO, MAX_START_RATIO, MAX_WHOLE_GB = 1.1, 1.3, 3.2
START_LIMIT_S = 300.0
POLL_S = 0.1
# After the first answer: parts that have rested for five seconds give memory back.
SETTLE_S = 12.0
SHOWN_PACKAGES = 8


@dataclass(frozen=True, slots=True)
class Measured:
    """One start of one system: seconds until it did what it is for, and its processes a while later."""

    ready_s: float
    processes: Sequence[ProcessMemory]

    @property
    def whole(self) -> int:
        """Proportional bytes of all processes."""
        return sum(process.proportional for process in self.processes)

    def expert(self, attribute: str) -> float:
        """Bytes of the median expert group, or of the empty replica in its place."""
        found = [getattr(process, attribute) for process in self.processes if process.kind.startswith(EXPERT)]
        return float(statistics.median(found))


def measure_demo(checkpoint: Path, image: bytes) -> Measured:
    """From `echoray serve` to the first text of an answer."""
    with _running([ECHORAY, "serve", "--checkpoint", checkpoint]) as (server, started):
        _first_text(server, image)
        ready_s = time.monotonic() - started
        time.sleep(SETTLE_S)
        return Measured(ready_s, memory_below(server.pid, COMMAND))


def measure_floor(checkpoint: Path) -> Measured:
    """From the start of the command to the moment at which all empty replicas run."""
    with _running([sys.executable, "-m", "benchmarks.empty_system", checkpoint]) as (server, started):
        assert server.stdout is not None
        if not server.stdout.readline():
            raise RuntimeError(f"the empty system ended with {server.wait()}")
        ready_s = time.monotonic() - started
        time.sleep(SETTLE_S)
        return Measured(ready_s, memory_below(server.pid, COMMAND))


def profile_demo(checkpoint: Path, image: bytes) -> dict[str, ImportProfile]:
    """Part → what it imported until after the first answer."""
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    with _running([ECHORAY, "serve", "--checkpoint", checkpoint], environment) as (server, _):
        _first_text(server, image)
        parts = {
            process.kind: process.pid
            for process in memory_below(server.pid, COMMAND)
            if any(part.startswith("ray::ServeReplica") for part in psutil.Process(process.pid).cmdline())
        }
        return {part: profile_of_worker(_logs(server.pid), pid) for part, pid in parts.items()}


@contextmanager
def _running(
    command: Sequence[str | Path], environment: dict[str, str] | None = None
) -> "Iterator[tuple[subprocess.Popen[str], float]]":
    started = time.monotonic()
    server = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        yield server, started
    finally:
        # As a terminal does it: to the whole group.
        os.killpg(server.pid, signal.SIGINT)
        server.communicate()


def _first_text(server: "subprocess.Popen[str]", image: bytes) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    with EchoVLMClient() as client:
        while True:
            try:
                for event in client.stream(images=[image], task="report", max_new_tokens=32):
                    if isinstance(event, Text):
                        return
            except EchoVLMError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise
            time.sleep(POLL_S)


def _logs(pid: int) -> Path:
    option = "--log_dir="
    for process in psutil.Process(pid).children(recursive=True):
        for argument in process.cmdline():
            if argument.startswith(option):
                return Path(argument.removeprefix(option))
    raise RuntimeError("no process of Ray names the folder of its logs")


def report(demo: Sequence[Measured], floor: Sequence[Measured], profiles: dict[str, ImportProfile]) -> str:
    """The page of results."""
    ready, empty = (statistics.median(run.ready_s for run in runs) for runs in (demo, floor))
    last, last_floor = demo[-1], floor[-1]
    lines = [
        "# Start and memory of the demo, beside their floor",
        "",
        describe(),
        f"{len(demo)} starts of each, in turn, already installed; demo checkpoint, echocardiogram of 30 frames. The "
        "floor is as many empty replicas of Ray Serve, which import torch and start a gRPC server, with the same "
        "settings. Memory is that of the last start, twelve seconds after the first answer; proportional: a page that "
        "several processes share is divided among them.",
        *(["pandas is installed here, which Ray Serve then imports in every process."] if find_spec("pandas") else []),
        "",
        "| measure | demo | floor | ratio | target |",
        "| --- | --- | --- | --- | --- |",
        f"| seconds from the command to the first text, or until all run | {ready:.1f} | {empty:.1f} | "
        f"{ready / empty:.2f} | ≤ {MAX_START_RATIO} |",
    ]
    for words, attribute in (("resident", "resident"), ("proportional", "proportional")):
        own, least = last.expert(attribute), last_floor.expert(attribute)
        lines.append(
            f"| an expert group, {words} MiB | {_mib(own)} | {_mib(least)} | {own / least:.2f} | ≤ {MAX_EXPERT_RATIO} |"
        )
    lines.append(
        f"| the whole system, proportional GB | {last.whole / 1e9:.2f} | {last_floor.whole / 1e9:.2f} | "
        f"{last.whole / last_floor.whole:.2f} | ≤ {MAX_WHOLE_GB} GB |"
    )
    lines += ["", "| process | resident MiB | proportional MiB | in the floor |", "| --- | --- | --- | --- |"]
    beneath = {kind: _sum(last_floor, kind) for kind in dict.fromkeys(process.kind for process in last.processes)}
    for kind in sorted(beneath, key=lambda kind: (not kind.startswith(EXPERT), kind)):
        resident, proportional = _sum(last, kind)
        floor_mib = _mib(beneath[kind][1]) if beneath[kind][1] else ""
        lines.append(f"| {kind} | {_mib(resident)} | {_mib(proportional)} | {floor_mib} |")
    lines += [
        "",
        "What each part imports, beyond Ray itself: seconds that modules took themselves, by package, with "
        "`-X importtime` on while all parts start together.",
        "",
        "| part | modules | seconds | packages |",
        "| --- | --- | --- | --- |",
    ]
    for part, profile in sorted(profiles.items()):
        packages = ", ".join(f"{name} {taken:.2f}" for name, taken in list(profile.packages.items())[:SHOWN_PACKAGES])
        lines.append(f"| {part} | {profile.modules} | {profile.seconds:.1f} | {packages} |")
    return "\n".join(lines) + "\n"


def _sum(run: Measured, kind: str) -> tuple[int, int]:
    of_kind = [process for process in run.processes if process.kind == kind]
    return sum(process.resident for process in of_kind), sum(process.proportional for process in of_kind)


def _mib(size: float) -> str:
    return f"{size / 2**20:.0f}"


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="the demo (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="how often to start each system (default: %(default)s)")
    options = parser.parse_args()
    console = Console()
    image = Path(str(get_testdata_file("examples_ybr_color.dcm"))).read_bytes()
    demo, floor = [], []
    for run in range(options.runs):
        with console.status(f"run {run + 1} of {options.runs}"):
            floor.append(measure_floor(options.checkpoint))
            demo.append(measure_demo(options.checkpoint, image))
    with console.status("what every part imports"):
        profiles = profile_demo(options.checkpoint, image)
    text = report(demo, floor, profiles)
    RESULT.write_text(text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
