"""The base install in an environment of its own: neither torch nor ray comes along, and client and command work."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.client.scripted_server import PIECES, ScriptedEchoVLM, serving

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("protos", "experts", "router", "echovlm_ray", "cluster")
HEAVY = {"torch", "ray", "transformers", "numpy"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the package installed from a copy, so that no build output lands here."""
    directory = tmp_path_factory.mktemp("client_only")
    source = directory / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = directory / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True, capture_output=True, timeout=60)
    command = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    installed = subprocess.run(
        [*command, "--constraint", ROOT / "constraints.txt", source], capture_output=True, text=True, timeout=240
    )
    assert installed.returncode == 0, installed.stderr
    return environment


def run(environment: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # From a folder without sources, so that only what is installed can be imported.
    return subprocess.run(
        [environment / "bin" / command[0], *command[1:]],
        cwd=environment,
        env={"PATH": os.environ["PATH"], "COLUMNS": "200", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_nothing_heavy_is_installed(environment: Path) -> None:
    listed = run(environment, "python", "-m", "pip", "list", "--format=json", "--disable-pip-version-check")
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert {"echovlm-ray", "grpcio"} <= names
    assert not names & HEAVY, f"a client needs none of them: {names & HEAVY}"


def test_the_client_calls_a_server(environment: Path) -> None:
    code = (
        "import sys\n"
        "from echovlm_ray.client import AsyncEchoVLMClient, EchoVLMClient\n"
        "with EchoVLMClient(sys.argv[1]) as client:\n"
        "    print(client.model_info().name, client.generate(b'x').text)\n"
    )
    with serving(ScriptedEchoVLM()) as address:
        called = run(environment, "python", "-c", code, address, PYTHONUTF8="1")
    assert called.stderr == ""
    assert called.stdout == f"echovlm-test {''.join(PIECES)}\n"


def test_the_command_calls_a_server(environment: Path) -> None:
    image = environment / "scan.png"
    image.write_bytes(b"a picture")
    with serving(ScriptedEchoVLM()) as address:
        called = run(environment, "echoray", "generate", str(image), "--server", address, PYTHONUTF8="1")
    assert called.returncode == 0, called.stderr
    assert called.stdout == "".join(PIECES) + "\n"


@pytest.mark.parametrize("command", ["generate", "info"])
def test_the_command_helps(environment: Path, command: str) -> None:
    helped = run(environment, "echoray", command, "--help")
    assert helped.returncode == 0, helped.stderr
    assert "--server" in re.sub(r"\x1b\[[0-9;]*m", "", helped.stdout)


@pytest.mark.parametrize("command", [["serve"], ["checkpoint", "inspect", "."]])
def test_a_command_that_needs_more_says_what_to_install(environment: Path, command: list[str]) -> None:
    refused = run(environment, "echoray", *command)
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr
    assert "[serve]" in refused.stdout + refused.stderr
