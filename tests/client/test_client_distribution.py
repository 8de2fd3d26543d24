"""The distribution `echovlm-ray-client`: its contents, and that it works with old versions of other packages."""

import ast
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

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


def python(code: str, path: Path, *arguments: str, **variables: str) -> str:
    """Runs code in this environment, which has the server's packages, with the client's first on the path."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(path), "PYTHONUTF8": "1", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def names_of(node: ast.stmt) -> list[str]:
    """What a statement of a module's stub declares."""
    match node:
        case ast.ClassDef(name=name):
            return [name]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case _:
            return []


def test_it_has_one_package(unpacked: Path) -> None:
    tops = {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"}
    assert tops == {"echovlm_ray_client"}
    package = unpacked / "echovlm_ray_client"
    assert (package / "py.typed").is_file()
    sources = {path.stem for path in (ROOT / "echovlm_ray" / "client").glob("*.py")}
    assert {path.stem for path in package.glob("*.py")} == sources | {"events", "tasks"}
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
        least, limit = sorted(Requirement(text).specifier, key=str, reverse=True)
        own_least, own_limit = sorted(Requirement(own[name]).specifier, key=str, reverse=True)
        assert Version(least.version) <= Version(own_least.version), f"{name}: the whole package allows an older one"
        assert str(limit) == str(own_limit), name
    for name in ("LICENSE", "NOTICE"):
        assert next(unpacked.glob(f"*.dist-info/licenses/{name}")).read_text() == (ROOT / name).read_text()


def test_it_works_with_the_oldest_that_it_names(wheel: Path, tmp_path: Path) -> None:
    pins = oldest(CLIENT_DISTRIBUTION / "pyproject.toml")
    environment = Environment.create(tmp_path / "environment", [wheel, *pins])
    assert environment.version("protobuf") == "5.26.0"
    with serving(ScriptedEchoVLM()) as address:
        for implementation in ("upb", "python"):
            called = environment.run(
                *("python", "-W", "error", "-c", CALL, address), PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=implementation
            )
            assert called.stderr == ""
            assert called.stdout == f"echovlm-test {''.join(PIECES)}\n"


@pytest.mark.parametrize("implementation", ["upb", "python"])
def test_its_messages_have_all_that_the_generated_code_has(unpacked: Path, implementation: str) -> None:
    names = {
        stub.stem: [name for node in ast.parse(stub.read_text()).body for name in names_of(node)]
        for stub in (unpacked / "echovlm_ray_client" / "protos").glob("*.pyi")
    }
    assert {"TASK_VQA", "Task", "GenerateRequest"} <= set(names["echovlm_pb2"])
    code = (
        "import copy, importlib, json, pickle, sys\n"
        "for module, names in json.loads(sys.argv[1]).items():\n"
        "    generated = importlib.import_module(f'protos.{module}')\n"
        "    own = importlib.import_module(f'echovlm_ray_client.protos.{module}')\n"
        "    for name in names:\n"
        "        ours, theirs = getattr(own, name), getattr(generated, name)\n"
        "        if hasattr(theirs, 'items'):\n"
        "            assert ours.items() == theirs.items(), name\n"
        "        if isinstance(theirs, type):\n"
        "            assert ours.DESCRIPTOR.full_name == theirs.DESCRIPTOR.full_name\n"
        # In pure Python, the entry types of maps are attributes of generated code alone.
        "            missing = {part for part in dir(theirs) if part[-5:] != 'Entry' and not hasattr(ours, part)}\n"
        "            assert not missing, f'{name} lacks {missing}'\n"
        "            message = ours()\n"
        "            assert pickle.loads(pickle.dumps(message)) == copy.deepcopy(message) == message\n"
        "print('alike')\n"
    )
    chosen = {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": implementation}
    assert python(code, unpacked, json.dumps(names), **chosen) == "alike\n"


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
