"""Resolves the dependencies again: `make lock` writes constraints.txt and the lists with hashes beside this file.

What constraints.txt names stays at its version; to raise a package, change or delete its line there (and in
pyproject.toml, where it stands), and run this. The lists hold every file that the index has of a release, so one list
serves every Python and every processor for which there are wheels.
"""

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
# Builds of torch without CUDA, which are not on the index but on PyTorch's own, by file.
CPU_BUILDS = {
    "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl": (
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
    ),
}
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
# Made by hand: megablocks' own dependencies do not resolve.
TRITON = ROOT / "constraints-triton.txt"


def resolve(*arguments: str | Path, requirements: Sequence[str] = ()) -> dict[str, str]:
    """Resolves with uv: the lines of each package by its name, the pin first and then a hash a line."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as file:
        file.write("\n".join(requirements))
        file.flush()
        sources = [str(argument) for argument in arguments] + ([file.name] if requirements else [])
        done = subprocess.run(
            [*COMPILE, "--generate-hashes", *sources], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
        )
    return {entry.split("==")[0]: with_cpu_builds(entry) for entry in entries(done.stdout)}


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


def with_cpu_builds(entry: str) -> str:
    """Adds the hashes of builds that the index does not have."""
    for file, digest in CPU_BUILDS.items():
        name, version = re.split("[-+]", file)[:2]
        if re.match(rf"{name}=={re.escape(version)}(?![\w.])", entry):
            entry += f" \\\n    --hash=sha256:{digest}"
    return entry


def is_cuda(name: str) -> bool:
    """Whether only torch's build for CUDA needs this."""
    return name.startswith(("cuda-", "nvidia-")) or name == "triton"


def write(path: Path, title: str, lines: Sequence[str]) -> None:
    """Writes a list below its title."""
    path.write_text("".join(f"{line}\n" for line in [*(f"# {line}" for line in title.splitlines()), *lines]))


def main() -> None:
    """Writes constraints.txt, serve.txt, cuda.txt, dev.txt and the triton-check's list."""
    pins = ("--constraint", ROOT / "constraints.txt", ROOT / "pyproject.toml")
    everything = resolve("--extra=serve", "--extra=dev", *pins)
    serve = resolve("--extra=serve", "--extra=video", *pins)
    compiler = resolve("--no-deps", requirements=[f"{COMPILER} ; python_version < '3.14'"])

    own = "Written by `make lock`: every file of each release, by its hash."
    cuda = [entry for name, entry in serve.items() if is_cuda(name)]
    write(FOLDER / "serve.txt", f"What `make serve` installs. {own}", [e for n, e in serve.items() if not is_cuda(n)])
    write(FOLDER / "cuda.txt", f"What torch needs beside serve.txt where its build is one for CUDA. {own}", cuda)
    beyond = [entry for name, entry in everything.items() if name not in serve]
    write(FOLDER / "dev.txt", f"What `make test` installs beside serve.txt. {own}", [*beyond, *compiler.values()])
    title = (
        "The whole resolution, written by `make lock`; the direct dependencies are pinned in pyproject.toml. torch\n"
        "carries no build tag: where a CPU build is offered it is taken. With hashes: requirements/."
    )
    write(ROOT / "constraints.txt", title, [entry.split(" \\\n")[0] for entry in everything.values()])

    triton = resolve("--no-deps", requirements=TRITON.read_text().splitlines())
    write(FOLDER / "triton.txt", f"What `make triton-check` installs. {own}", list(triton.values()))


if __name__ == "__main__":
    main()
