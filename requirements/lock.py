"""Resolves the dependencies again: `make lock` writes constraints.txt and the lists with hashes beside this file.

What constraints.txt names stays at its version; to raise a package, change or delete its line there (and in
pyproject.toml, where it stands), and run this. The lists hold every file that the index has of a release, so one list
serves every Python and every processor for which there are wheels.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from packaging.markers import Marker

from protos.generate import COMPILER

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(__file__).resolve().parent
# Builds of torch without CUDA are not on the index but on PyTorch's own, or on a disk: one that is known is preferred.
CPU_BUILD = """\
torch==2.13.0+cpu \\
    --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"""
TARGETS: list[dict[str, str]] = [
    {
        "implementation_name": "cpython",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }
    for python, machine in product(("3.11", "3.12", "3.13", "3.14"), ("x86_64", "aarch64"))
]
COMPILE = (
    sys.executable,
    "-m",
    "uv",
    "pip",
    "compile",
    "--quiet",
    "--universal",
    "--python-version=3.11",
    "--no-header",
    "--no-annotate",
)
# Built against what triton.txt installs.
MEGABLOCKS = ("megablocks==0.10.0", "stanford-stk==0.7.1")


def resolve(*arguments: str | Path, requirements: Sequence[str] = ()) -> dict[str, str]:
    """Resolves with uv: the lines of each package by its name, the pin first and then a hash a line."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as file:
        file.write("\n".join(requirements))
        file.flush()
        sources = [str(argument) for argument in arguments] + ([file.name] if requirements else [])
        done = subprocess.run(
            [*COMPILE, "--generate-hashes", *sources], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
        )
    return {entry.split("==")[0]: entry for entry in entries(done.stdout)}


def entries(text: str) -> Iterator[str]:
    """What uv resolved, each package with the lines of its hashes; without what no target needs.

    uv resolves for every system there is. A condition that holds on all of `TARGETS` is left out.
    """
    for entry in re.split(r"(?<!\\)\n", text.strip()):
        pin, *hashes = entry.split(" \\\n")
        pin, _, condition = pin.partition(" ; ")
        wanted = [not condition or Marker(condition).evaluate(target) for target in TARGETS]
        if any(wanted):
            yield " \\\n".join([pin if all(wanted) else f"{pin} ; {condition}", *hashes])


def is_torch(name: str) -> bool:
    """Whether this is torch, or what only its build for CUDA needs."""
    return name.startswith(("cuda-", "nvidia-")) or name in ("torch", "triton")


def write(path: Path, title: str, lines: Sequence[str]) -> None:
    """Writes a list below its title."""
    path.write_text("".join(f"{line}\n" for line in [*(f"# {line}" for line in title.splitlines()), *lines]))


def main() -> None:
    """Writes constraints.txt, the lists for torch, serving and tests, and the triton-check's list."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pins = ("--constraint", ROOT / "constraints.txt", ROOT / "pyproject.toml")
    everything = resolve("--extra=serve", "--extra=dev", *pins)
    serve = resolve("--extra=serve", "--extra=video", "--extra=data", *pins)
    compiler = resolve("--no-deps", requirements=[f"{COMPILER} ; python_version < '3.14'"])

    own = "Written by `make lock`: every file of each release, by its hash."
    torch = [entry for name, entry in serve.items() if is_torch(name)]
    write(FOLDER / "torch-cuda.txt", f"torch as the index has it, and what it needs beside serve.txt. {own}", torch)
    write(FOLDER / "torch-cpu.txt", f"torch's build without CUDA, for Python 3.11 on x86_64. {own}", [CPU_BUILD])
    others = [entry for name, entry in serve.items() if not is_torch(name)]
    write(FOLDER / "serve.txt", f"What `make serve` installs beside torch. {own}", others)
    beyond = [entry for name, entry in everything.items() if name not in serve]
    write(FOLDER / "dev.txt", f"What `make test` installs beside serve.txt. {own}", [*beyond, *compiler.values()])
    title = (
        "The whole resolution, written by `make lock`; the direct dependencies are pinned in pyproject.toml. torch\n"
        "carries no build tag: where a CPU build is offered it is taken. With hashes: requirements/."
    )
    write(ROOT / "constraints.txt", title, [entry.split(" \\\n")[0] for entry in everything.values()])

    for name, title, requirements in (
        ("triton", "What `make triton-check` installs beside torch", (FOLDER / "triton.in").read_text().splitlines()),
        ("megablocks", "The sources that `make triton-check` builds", MEGABLOCKS),
    ):
        resolved = resolve("--no-deps", requirements=requirements)
        write(FOLDER / f"{name}.txt", f"{title}. {own}", list(resolved.values()))


if __name__ == "__main__":
    main()
