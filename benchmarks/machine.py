"""The description of the machine in every result."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil

LIBRARIES = ("ray", "torch", "transformers", "grpcio", "protobuf")


def describe() -> str:
    """One paragraph of Markdown: processor, cores, memory, versions, date."""
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    memory = psutil.virtual_memory().total / 1024**3
    return (
        f"Measured on {datetime.date.today().isoformat()}: {_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"{platform.system()}, Python {platform.python_version()}, {libraries}."
    )


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()
