"""The client with the newest packages that its ranges allow: `make client-check`, because what is newest changes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.client.environments import CLIENT_DISTRIBUTION, Environment
from tests.client.scripted_server import PIECES, ScriptedEchoVLM, serving
from tests.client.test_client_distribution import CALL


def test_it_works_with_the_newest(tmp_path: Path) -> None:
    environment = Environment.create(tmp_path / "environment", ["--upgrade", CLIENT_DISTRIBUTION])
    with serving(ScriptedEchoVLM()) as address:
        called = environment.run("python", "-W", "error", "-c", CALL, address)
    print(*(f"{name} {environment.version(name)}" for name in ("grpcio", "protobuf", "googleapis-common-protos")))
    assert called.stderr == ""
    assert called.stdout == f"echovlm-test {''.join(PIECES)}\n"


def test_nothing_else_is_installed(tmp_path: Path) -> None:
    environment = Environment.create(tmp_path / "environment", [CLIENT_DISTRIBUTION])
    listed = environment.run("python", "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check").stdout
    names = {line.split("==")[0].lower() for line in listed.splitlines()}
    known = {"echovlm-ray-client", "grpcio", "googleapis-common-protos", "protobuf", "typing_extensions"}
    assert names - {"pip", "setuptools"} == known


# The second one needs protobuf 5 and gRPC below 1.68.
@pytest.mark.parametrize("tritonclient", ["tritonclient[grpc]", "tritonclient[grpc]==2.54.0"])
def test_it_works_beside_triton_s_client(tmp_path: Path, tritonclient: str) -> None:
    environment = Environment.create(tmp_path / "environment", ["--upgrade", CLIENT_DISTRIBUTION, tritonclient])
    with serving(ScriptedEchoVLM()) as address:
        called = environment.run("python", "-c", f"import tritonclient.grpc\n{CALL}", address)
    assert called.stderr == ""
    assert called.stdout == f"echovlm-test {''.join(PIECES)}\n"


def test_pip_finds_versions_of_it_and_kserve_that_fit() -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    resolved = subprocess.run([*pip, CLIENT_DISTRIBUTION, "kserve"], capture_output=True, text=True, timeout=240)
    assert resolved.returncode == 0, resolved.stderr
