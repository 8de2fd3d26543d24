"""Environments of their own in which a test installs the client, as its users do."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CLIENT_DISTRIBUTION = ROOT / "echovlm_ray" / "client" / "distribution"


@dataclass(frozen=True)
class Environment:
    """A virtual environment in a folder."""

    folder: Path

    @classmethod
    def create(cls, folder: Path, arguments: Sequence[str | Path]) -> "Environment":
        """Makes one and installs into it what pip's arguments say."""
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True, timeout=60)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        installed = subprocess.run([*pip, *map(str, arguments)], capture_output=True, text=True, timeout=240)
        assert installed.returncode == 0, installed.stderr
        return cls(folder)

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of the environment, from a folder without sources: only what is installed can be imported."""
        return subprocess.run(
            [self.folder / "bin" / command[0], *command[1:]],
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "COLUMNS": "200", "PYTHONUTF8": "1", **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def version(self, package: str) -> str:
        """The version of a package that is installed."""
        code = f"from importlib.metadata import version; print(version({package!r}))"
        return self.run("python", "-c", code).stdout.strip()


def oldest(pyproject: Path) -> list[str]:
    """The lower bounds of a project's dependencies, as pins."""
    pins = []
    for dependency in tomllib.loads(pyproject.read_text())["project"]["dependencies"]:
        bounds = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<[\d.]+)?", dependency)
        assert bounds is not None, f"{dependency} is no range"
        pins.append(f"{bounds[1]}=={bounds[2]}")
    return pins
