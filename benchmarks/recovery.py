"""How fast a killed expert replica is back, and whether other organs notice: `python -m benchmarks.recovery`.

Needs a running system (`make serve`). Streams to three organs without pause, kills the expert process of a fourth with
SIGKILL, again and again, and asks that organ at once for an answer. Writes `benchmarks/results/recovery.md`.
"""

import argparse
import os
import signal
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.machine import describe
from benchmarks.measure_table import table_head
from benchmarks.running_parts import first_replicas
from echovlm_ray.client import EchoVLMClient, EchoVLMError, Text

RESULT = Path(__file__).resolve().parent / "results" / "recovery.md"
TARGET_SECONDS = 5.0
OTHERS = ("liver", "thyroid", "kidney")


@dataclass
class Load:
    """Streams without pause, and what they saw."""

    server: str
    gaps: list[float] = field(default_factory=list)
    answers: int = 0
    failures: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(self, organ: str) -> None:
        """Asks one organ until stopped; notes the pause before every piece of text."""
        with EchoVLMClient(self.server) as client:
            while not self.stopping.is_set():
                last = time.monotonic()
                try:
                    for event in client.stream(prompt="What is shown?", task="free", organs=[organ], max_new_tokens=64):
                        if isinstance(event, Text):
                            now = time.monotonic()
                            self.gaps.append(now - last)
                            last = now
                    self.answers += 1
                except EchoVLMError:
                    self.failures += 1


def recover(organ: str, server: str, control: str) -> float:
    """Kills the organ's expert process; seconds until it has answered a request that was sent immediately."""
    os.kill(first_replicas(control)[f"expert-{organ}"].pid, signal.SIGKILL)
    killed_at = time.monotonic()
    with EchoVLMClient(server) as client:
        client.generate(prompt="Again?", task="free", organs=[organ], max_new_tokens=1, timeout_s=120)
    return time.monotonic() - killed_at


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="127.0.0.1:50051", help="the gateway (default: %(default)s)")
    parser.add_argument("--control", default="127.0.0.1:50052", help="Control (default: %(default)s)")
    parser.add_argument("--organ", default="heart", help="whose process is killed (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=5, help="how often (default: %(default)s)")
    options = parser.parse_args()
    console = Console()
    load = Load(options.server)
    threads = [threading.Thread(target=load.run, args=(organ,)) for organ in OTHERS]
    for thread in threads:
        thread.start()
    times = []
    try:
        for _ in track(range(options.kills), "killing", console=console):
            time.sleep(3.0)
            times.append(recover(options.organ, options.server, options.control))
    finally:
        load.stopping.set()
        for thread in threads:
            thread.join()
    asked, target = load.answers + load.failures, f"≤ {TARGET_SECONDS:.0f}"
    lines = [
        "# A killed expert replica",
        "",
        describe(),
        f"SIGKILL of the process of {options.organ}, {options.kills} times; three other organs stream meanwhile. Demo.",
        "",
        *table_head("| measure | value | target |"),
        f"| seconds until the killed organ has answered, median | {statistics.median(times):.1f} | {target} |",
        f"| the same, worst | {max(times):.1f} | {target} |",
        f"| failed requests of other organs, of {asked} | {load.failures} | 0 |",
        f"| longest pause between two pieces of their text, seconds | {max(load.gaps):.2f} | |",
        f"| median pause, seconds | {statistics.median(load.gaps):.3f} | |",
    ]
    text = "\n".join(lines) + "\n"
    RESULT.write_text(text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
