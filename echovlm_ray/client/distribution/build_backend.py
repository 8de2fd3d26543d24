"""Builds echovlm-ray-client: the client and its contracts as a single package.

A PEP 517 build backend around setuptools. It copies the sources and rewrites their imports; the repository is not
changed. The source distribution (sdist) contains the copy, and is built with setuptools only.
"""

import ast
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from setuptools import build_meta

FOLDER = Path(__file__).resolve().parent
CLIENT = FOLDER.parent
ROOT = CLIENT.parent.parent
# What client and server have in common.
SHARED = (CLIENT.parent / "events.py", CLIENT.parent / "tasks.py")
# What callers and operators need, each after what it imports; the others are between the parts of the server.
CONTRACTS = ("tensor", "vision", "router", "echovlm", "control")
# In the order in which they are applied.
IMPORTS = (
    (r"\bechovlm_ray\.client\b", "echovlm_ray_client"),
    (r"\bechovlm_ray\.(events|tasks)\b", r"echovlm_ray_client.\1"),
    (r"\bfrom protos import\b", "from echovlm_ray_client.protos import"),
)
MESSAGES = '''\
"""The messages of protos/{name}.proto."""

from echovlm_ray_client.protos import contracts

globals().update(contracts.messages({descriptor!r}, __name__))
'''
STUBS = '''\
"""The services of protos/{name}.proto."""

from echovlm_ray_client.protos import {name}_pb2, contracts

globals().update(contracts.stubs({name}_pb2.DESCRIPTOR))
'''


def build_wheel(wheel_directory: str, config_settings: object = None, metadata_directory: object = None) -> str:
    """Builds the wheel, and returns its file's name; see PEP 517."""
    with _staged():
        return str(build_meta.build_wheel(wheel_directory))


def build_sdist(sdist_directory: str, config_settings: object = None) -> str:
    """Builds the sources' distribution, and returns its file's name; see PEP 517."""
    with _staged():
        return str(build_meta.build_sdist(sdist_directory))


def stage(target: Path) -> None:
    """Writes the sources of `echovlm_ray_client` and the setuptools configuration to a folder.

    Raises:
        ValueError: protobuf's compiler generates code that this module cannot rewrite.
    """
    package = target / "echovlm_ray_client"
    contracts = package / "protos"
    contracts.mkdir(parents=True)
    for source in (*CLIENT.glob("*.py"), *SHARED):
        (package / source.name).write_text(_renamed(source.read_text()))
    (package / "py.typed").touch()
    names = ", ".join(f"{name}_pb2" for name in CONTRACTS)
    (contracts / "__init__.py").write_text(
        '"""The contracts with the server: their descriptors, and what is made of them."""\n\n'
        f"from echovlm_ray_client.protos import {names}\n\n__all__ = {[f'{name}_pb2' for name in CONTRACTS]!r}\n"
    )
    shutil.copy(FOLDER / "contracts.py", contracts)
    for name in CONTRACTS:
        generated = ROOT / "protos" / f"{name}_pb2.py"
        (contracts / generated.name).write_text(MESSAGES.format(name=name, descriptor=_descriptor(generated)))
        (contracts / f"{name}_pb2_grpc.py").write_text(STUBS.format(name=name))
        (contracts / f"{name}_pb2.pyi").write_text(_renamed(generated.with_suffix(".pyi").read_text()))
    project = (FOLDER / "pyproject.toml").read_text()
    project = re.sub(
        r"(?m)^#.*\nbuild-backend.*\nbackend-path.*\n", 'build-backend = "setuptools.build_meta"\n', project
    )
    (target / "pyproject.toml").write_text(project)
    shutil.copy(FOLDER / "README.md", target)
    for name in ("LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, target)


def _descriptor(generated: Path) -> bytes:
    """The serialized descriptor that a generated module registers."""
    for node in ast.walk(ast.parse(generated.read_text())):
        match node:
            case ast.Call(func=ast.Attribute(attr="AddSerializedFile"), args=[ast.Constant(value=bytes(descriptor))]):
                return descriptor
    raise ValueError(f"{generated} does not register a descriptor as it used to")


def _renamed(text: str) -> str:
    for pattern, replacement in IMPORTS:
        text = re.sub(pattern, replacement, text)
    return text


@contextlib.contextmanager
def _staged() -> Iterator[None]:
    """Stages the sources in a temporary folder and makes it the working directory, as setuptools needs."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        stage(Path(folder))
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)
