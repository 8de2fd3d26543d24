"""The base install in a separate environment: without torch and ray, and client and command work."""

import json
import re
import shutil

import pytest

from tests.client.environments import ROOT, Environment, oldest
from tests.client.scripted_server import PIECES, ScriptedEchoVLM, serving

PACKAGES = ("protos", "experts", "router", "echovlm_ray", "cluster")
HEAVY = {"torch", "ray", "transformers", "numpy"}


@pytest.fixture(scope="module", params=["pinned", "oldest"])
def environment(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Environment:
    """The package installed from a copy, so that no build output lands here."""
    directory = tmp_path_factory.mktemp("client_only")
    source = directory / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    pinned = ["--constraint", str(ROOT / "constraints.txt")]
    versions = pinned if request.param == "pinned" else oldest(ROOT / "pyproject.toml")
    return Environment.create(directory / "environment", [*versions, source])


def test_nothing_heavy_is_installed(environment: Environment) -> None:
    listed = environment.run("python", "-m", "pip", "list", "--format=json", "--disable-pip-version-check")
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert {"echovlm-ray", "grpcio"} <= names
    assert not names & HEAVY, f"a client needs none of them: {names & HEAVY}"


def test_the_client_calls_a_server(environment: Environment) -> None:
    code = (
        "import sys\n"
        "from echovlm_ray.client import AsyncEchoVLMClient, EchoVLMClient\n"
        "with EchoVLMClient(sys.argv[1]) as client:\n"
        "    print(client.model_info().name, client.generate(b'x').text)\n"
    )
    with serving(ScriptedEchoVLM()) as address:
        called = environment.run("python", "-c", code, address)
    assert called.stderr == ""
    assert called.stdout == f"echovlm-test {''.join(PIECES)}\n"


def test_the_command_calls_a_server(environment: Environment) -> None:
    image = environment.folder / "scan.png"
    image.write_bytes(b"a picture")
    with serving(ScriptedEchoVLM()) as address:
        called = environment.run("echoray", "generate", str(image), "--server", address)
    assert called.returncode == 0, called.stderr
    assert called.stdout == "".join(PIECES) + "\n"


@pytest.mark.parametrize("command", ["generate", "info"])
def test_the_command_helps(environment: Environment, command: str) -> None:
    helped = environment.run("echoray", command, "--help")
    assert helped.returncode == 0, helped.stderr
    assert "--server" in re.sub(r"\x1b\[[0-9;]*m", "", helped.stdout)


@pytest.mark.parametrize("command", [["serve"], ["checkpoint", "inspect", "."]])
def test_a_command_that_needs_more_says_what_to_install(environment: Environment, command: list[str]) -> None:
    refused = environment.run("echoray", *command)
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr
    assert "[serve]" in refused.stdout + refused.stderr
