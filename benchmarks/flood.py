"""A caller with many long prompts running, in a separate process: `python -m benchmarks.flood`.

Prints a line with the number of answers, and of requests that failed, after each, and ends when its standard input is
closed.
"""

import argparse
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from echovlm_ray.checkpoint.demo_text import ENGLISH
from echovlm_ray.client import EchoVLMClient, EchoVLMError

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "ECHOVLM_TOKEN"
TIMEOUT_S = 300.0
PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class Flood:
    """Requests of one caller that are running all the time.

    Attributes:
        at_once: how many.
        words: of each prompt, drawn at random.
        new_tokens: of each answer, at most.
    """

    at_once: int
    words: int
    new_tokens: int


@dataclass
class Counts:
    """The results of a flood's requests."""

    answered: int = 0
    failed: int = 0


@contextmanager
def flooded(address: str, token: str, flood: Flood, counts: Counts) -> Iterator[None]:
    """Runs a flood for the block, which begins after a quarter of it was answered once.

    Raises:
        RuntimeError: the flood's process ended.
    """
    command = [sys.executable, "-m", "benchmarks.flood", address, str(flood.at_once), str(flood.words)]
    process = subprocess.Popen(
        [*command, str(flood.new_tokens)],
        cwd=ROOT,
        env=os.environ | {TOKEN: token},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    before = Counts(counts.answered, counts.failed)
    begun = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answered, failed = map(int, line.split())
            counts.answered, counts.failed = before.answered + answered, before.failed + failed
            if answered >= flood.at_once // 4:
                begun.set()
        begun.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        begun.wait()
        if process.poll() is not None:
            raise RuntimeError("the flood's process has ended")
        yield
    finally:
        process.kill()
        process.wait()
        reader.join()
        # Its requests are cancelled, and the system is idle again.
        time.sleep(1.0)


def main() -> None:
    """Asks until the standard input is closed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    for name in ("at_once", "words", "new_tokens"):
        parser.add_argument(name, type=int)
    options = parser.parse_args()
    counts, lock = Counts(), threading.Lock()

    def ask(number: int) -> None:
        numbers = random.Random(number)
        with EchoVLMClient(options.address, token=os.environ[TOKEN], retry=False) as client:
            while True:
                prompt = " ".join(numbers.choices(ENGLISH.split(), k=options.words))
                try:
                    client.generate(prompt=prompt, task="free", max_new_tokens=options.new_tokens, timeout_s=TIMEOUT_S)
                    failed = 0
                except EchoVLMError:
                    failed = 1
                    time.sleep(PAUSE_S)
                with lock:
                    counts.answered += 1 - failed
                    counts.failed += failed
                    print(counts.answered, counts.failed, flush=True)

    for number in range(options.at_once):
        threading.Thread(target=ask, args=(number,), daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
