"""Executes the README and the pages of docs/: every command and snippet, against the running system.

Blocks of a page run in order in one folder, as a reader would type them: `sh` in bash, `python` in a process of its
own, `yaml` through the configuration's own check. Blocks marked `text` or `mermaid` are for reading. What installs or
serves forever is checked in another way, see `ELSEWHERE`. The addresses are those of the running system.
"""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from docs import write_structures
from echovlm_ray.config_file import load_config
from tests.running_system import RunningSystem

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"sh", "python", "yaml", "text", "proto", "mermaid"}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found.group(1), found.group(2))
        for found in BLOCK.finditer(text)
    ]


def make_target_exists(block: Block) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wanted = block.text.split()[1:]
    assert wanted
    assert set(wanted) <= targets, f"{block}: the Makefile has no target {set(wanted) - targets}"


def activation_is_of_this_environment(block: Block) -> None:
    # The Makefile makes it under this name; the tests themselves may run from another.
    assert block.text.strip() == ". .venv/bin/activate"
    assert re.search(r"^VENV \?= \.venv$", (ROOT / "Makefile").read_text(), re.MULTILINE)


# What would install, or never end.
ELSEWHERE: dict[str, Callable[[Block], None]] = {
    "make ": make_target_exists,
    ". .venv": activation_is_of_this_environment,
}


def run(block: Block, system: RunningSystem, directory: Path) -> None:
    text = block.text.replace("127.0.0.1:50051", system.gateway_address)
    text = text.replace("127.0.0.1:50052", system.control_address)
    python = Path(sys.executable)
    command = ["bash", "-euo", "pipefail", "-c", text] if block.language == "sh" else [str(python), "-c", text]
    done = subprocess.run(
        command,
        cwd=directory,
        env={
            **os.environ,
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
            "ECHORAY_SERVER": system.gateway_address,
            "ECHORAY_CONTROL": system.control_address,
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{block} ended with {done.returncode}:\n{block.text}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip(), f"{block} printed nothing:\n{block.text}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_works(page: Path, running_system: RunningSystem, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "demo").symlink_to(running_system.checkpoint)
    for name in ("protos", "cluster", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block}: say what language the block is in"
        check = next((check for start, check in ELSEWHERE.items() if block.text.startswith(start)), None)
        if check is not None:
            check(block)
        elif block.language == "yaml":
            file = tmp_path / "config.yaml"
            file.write_text(block.text)
            load_config(file)
        elif block.language in ("sh", "python"):
            run(block, running_system, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_exists(page: Path) -> None:
    """Commands in running text and in blocks that are only for reading: the subcommand and each option exist."""
    commands = re.findall(r"echoray ((?:[a-z]+ ?)+)((?:[^`\n]*))", page.read_text())
    for words, rest in commands:
        path = tuple(words.split())[: 2 if words.startswith(("checkpoint", "experts", "data", "eval", "train")) else 1]
        shown = help_of(path)
        assert shown is not None, f"{page.name}: there is no command echoray {' '.join(path)}"
        for option in re.findall(r"(?<!\S)--[a-z-]+", rest):
            assert option in shown, f"{page.name}: echoray {' '.join(path)} has no option {option}"


@cache
def help_of(path: tuple[str, ...]) -> str | None:
    """What a command's --help prints; None where there is no such command."""
    done = subprocess.run(
        [Path(sys.executable).with_name("echoray"), *path, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
    )
    return None if done.returncode else re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name} links to {target}, which is not there"


def test_the_extras_that_are_named_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for page in PAGES:
        for extra in re.findall(r"'\.\[([a-z,]+)\]'", page.read_text()):
            assert set(extra.split(",")) <= set(project["optional-dependencies"]), f"{page.name}: no extra {extra}"


@pytest.mark.parametrize("place", write_structures.PLACES, ids=lambda place: place.change)
def test_the_place_of_a_change_exists(place: write_structures.Place) -> None:
    # That the paths in the last column exist is tested in tests/test_repository.py.
    assert re.search(rf"\b{place.name}\b", (ROOT / place.path).read_text())


def test_the_structures_page_is_up_to_date() -> None:
    assert (ROOT / "docs/structures.md").read_text() == write_structures.page(), "run `make structures`"
