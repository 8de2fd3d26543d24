"""What a process spent on importing, read from what `python -X importtime` writes."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ImportProfile:
    """The imports of one process.

    Attributes:
        modules: how many.
        seconds: of all of them.
        packages: topmost package → seconds of its own modules, the longest first.
    """

    modules: int
    seconds: float
    packages: dict[str, float]


def read_profile(text: str) -> ImportProfile:
    """Adds up the times that modules took themselves, without what they import."""
    own: Counter[str] = Counter()
    modules = 0
    for microseconds, name in _LINE.findall(text):
        own[name.split(".")[0]] += int(microseconds)
        modules += 1
    packages = {name: taken / 1e6 for name, taken in own.most_common()}
    return ImportProfile(modules, sum(packages.values()), packages)


def profile_of_worker(logs: Path, pid: int) -> ImportProfile:
    """The imports of one of Ray's workers, from the file of its standard error.

    What it imports before Ray opens that file is missing: Ray itself.

    Args:
        logs: folder of Ray's session.
        pid: of the worker.
    """
    (found,) = logs.glob(f"worker-*-{pid}.err")
    return read_profile(found.read_text())
