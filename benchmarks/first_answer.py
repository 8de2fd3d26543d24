"""From `make serve` to the first answer, and the memory of every process: `python -m benchmarks.first_answer`.

Runs the installed system as a user does, on the default ports, with the demo checkpoint; asks for a report on a real
echocardiogram; and writes `benchmarks/results/first_answer.md`.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pydicom.data import get_testdata_file
from rich.console import Console

from benchmarks.machine import describe

ROOT = Path(__file__).resolve().parent.parent
ECHORAY = Path(sys.executable).with_name("echoray")
RESULT = ROOT / "benchmarks" / "results" / "first_answer.md"
TARGET_SECONDS = 45.0
TARGET_MIB = 350.0
POLL_SECONDS = 0.2


def measure(image: str) -> tuple[float, float, list[dict[str, Any]]]:
    """One run: seconds to the first text, seconds to the whole answer, and the replicas with their memory."""
    started = time.monotonic()
    server = subprocess.Popen(["make", "serve"], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while True:
            client = subprocess.Popen(
                [ECHORAY, "generate", image, "--task", "report", "--max-new-tokens", "32"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert client.stdout is not None
            first = client.stdout.read(1)
            first_s = time.monotonic() - started
            client.stdout.read()
            if client.wait() == 0 and first:
                break
            if server.poll() is not None:
                raise RuntimeError(f"make serve ended with {server.returncode}")
            time.sleep(POLL_SECONDS)
        whole_s = time.monotonic() - started
        status = json.loads(_status_of_the_whole())
        replicas = [
            {"application": application["name"], **replica}
            for application in status["applications"]
            for replica in application["replicas"]
        ]
        return first_s, whole_s, replicas
    finally:
        # As a terminal does it: to the whole group, for make passes no Ctrl-C on.
        os.killpg(server.pid, signal.SIGINT)
        server.wait()


def _status_of_the_whole() -> bytes:
    # The first answer may come while the last part is still starting, and then status ends with 1.
    while True:
        done = subprocess.run([ECHORAY, "status", "--json"], capture_output=True)
        if done.returncode == 0:
            return done.stdout
        time.sleep(POLL_SECONDS)


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="how often to start the system (default: %(default)s)")
    runs = parser.parse_args().runs
    console = Console()
    image = str(get_testdata_file("examples_ybr_color.dcm"))
    results = []
    for run in range(runs):
        with console.status(f"run {run + 1} of {runs}: starting the system"):
            results.append(measure(image))
    first = statistics.median(result[0] for result in results)
    whole = statistics.median(result[1] for result in results)
    lines = [
        "# From `make serve` to the first answer",
        "",
        describe(),
        f"Median of {runs} starts, already installed, demo checkpoint, echocardiogram of 30 frames.",
        "",
        "| measure | value | target |",
        "| --- | --- | --- |",
        f"| first text, seconds after `make serve` | {first:.1f} | ≤ {TARGET_SECONDS:.0f} |",
        f"| whole answer of 32 tokens, seconds after `make serve` | {whole:.1f} | |",
        "",
        "| process | resident MiB | target |",
        "| --- | --- | --- |",
    ]
    for replica in sorted(results[-1][2], key=lambda replica: str(replica["application"])):
        target = f"≤ {TARGET_MIB:.0f}" if replica["application"].startswith("expert-") else ""
        mebibytes = int(replica["resident_bytes"]) / 2**20
        lines.append(f"| {replica['application']} | {mebibytes:.0f} | {target} |")
    text = "\n".join(lines) + "\n"
    RESULT.write_text(text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
