"""The distribution `echovlm-ray-client`: its contents, and that it works with old versions of other packages."""

import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.client.environments import CLIENT_DISTRIBUTION, ROOT, Environment, oldest
from tests.client.scripted_server import PIECES, ScriptedEchoVLM, serving

CALL = """
import sys
from echovlm_ray_client import AsyncEchoVLMClient, EchoVLMClient
from echovlm_ray_client.control import ExpertControlClient
with EchoVLMClient(sys.argv[1]) as client:
    print(client.model_info().name, client.generate(b"x").text)
"""
# Another package of the names that the repository's own would take, and a message of the same name.
FOREIGN = """
from google.protobuf import descriptor_pb2, descriptor_pool
file = descriptor_pb2.FileDescriptorProto(name="protos/tensor.proto", package="echovlm.v1", syntax="proto3")
file.message_type.add(name="Tensor").field.add(name="other", number=7, type="TYPE_STRING", label="LABEL_OPTIONAL")
descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    built = subprocess.run(
        [*pip, "--no-build-isolation", "--wheel-dir", directory, CLIENT_DISTRIBUTION], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return next(directory.glob("*.whl"))


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


def python(code: str, path: Path, *arguments: str) -> str:
    """Runs code in this environment, which has the server's packages, with the client's first on the path."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(path), "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_has_one_package(unpacked: Path) -> None:
    tops = {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"}
    assert tops == {"echovlm_ray_client"}
    package = unpacked / "echovlm_ray_client"
    assert (package / "py.typed").is_file()
    assert {path.stem for path in package.glob("*.py")} == {
        path.stem for path in (*(ROOT / "echovlm_ray" / "client").glob("*.py"), ROOT / "echovlm_ray" / "tasks.py")
    }
    for source in package.rglob("*.py*"):
        left = re.search(r"^\s*(from|import) (echovlm_ray|protos|experts|router|cluster)\b", source.read_text(), re.M)
        assert left is None, f"{source.name} still has: {left}"


def test_its_metadata(unpacked: Path) -> None:
    metadata = Parser().parsestr(next(unpacked.glob("*.dist-info/METADATA")).read_text())
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (metadata["Name"], metadata["Version"]) == ("echovlm-ray-client", whole["version"])
    wanted = {re.split("[<>=]", text)[0]: text for text in metadata.get_all("Requires-Dist", [])}
    assert set(wanted) == {"grpcio", "googleapis-common-protos", "protobuf"}
    own = {re.split("[<>=]", text)[0]: text for text in whole["dependencies"]}
    for name, text in wanted.items():
        assert set(text.removeprefix(name).split(",")) == set(own[name].removeprefix(name).split(",")), name
    for name in ("LICENSE", "NOTICE"):
        assert next(unpacked.glob(f"*.dist-info/licenses/{name}")).read_text() == (ROOT / name).read_text()


def test_it_works_with_the_oldest_that_it_names(wheel: Path, tmp_path: Path) -> None:
    pins = oldest(CLIENT_DISTRIBUTION / "pyproject.toml")
    environment = Environment.create(tmp_path / "environment", [wheel, *pins])
    assert environment.version("protobuf") == "6.30.0"
    with serving(ScriptedEchoVLM()) as address:
        called = environment.run("python", "-W", "error", "-c", CALL, address)
    assert called.stderr == ""
    assert called.stdout == f"echovlm-test {''.join(PIECES)}\n"


def test_both_clients_work_in_one_process(unpacked: Path) -> None:
    code = (
        "import echovlm_ray.client, protos.control_pb2, protos.status_pb2\n"
        f"{CALL}\n"
        "with echovlm_ray.client.EchoVLMClient(sys.argv[1]) as client:\n"
        "    print(client.generate(b'x').text)\n"
        "import echovlm_ray_client\n"
        "assert echovlm_ray_client.InvalidRequestError is not echovlm_ray.client.InvalidRequestError\n"
    )
    with serving(ScriptedEchoVLM()) as address:
        printed = python(code, unpacked, address)
    assert printed == f"echovlm-test {''.join(PIECES)}\n{''.join(PIECES)}\n"


@pytest.mark.parametrize("order", [(FOREIGN, CALL), (CALL, FOREIGN)], ids=["after", "before"])
def test_it_works_beside_other_contracts_of_the_same_names(unpacked: Path, order: tuple[str, str]) -> None:
    with serving(ScriptedEchoVLM()) as address:
        printed = python("\n".join(order), unpacked, address)
    assert printed == f"echovlm-test {''.join(PIECES)}\n"


def test_its_source_distribution_builds_without_the_repository(tmp_path: Path) -> None:
    code = "import build_backend, sys; print(build_backend.build_sdist(sys.argv[1]))"
    built = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=CLIENT_DISTRIBUTION, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    source = next(tmp_path.glob("*.tar.gz"))
    subprocess.run([*pip, "--no-build-isolation", "--wheel-dir", tmp_path, source], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        assert "echovlm_ray_client/protos/echovlm_pb2.py" in archive.namelist()
