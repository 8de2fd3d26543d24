"""Builds echovlm-ray-client: the client and its contracts as a single package.

A PEP 517 build backend around setuptools. It copies the sources and rewrites their imports; the repository is not
changed. The source distribution (sdist) contains the copy, and is built with setuptools only.
"""

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
# Modules that client and server share.
TASKS = CLIENT.parent / "tasks.py"
# The contracts for callers and operators; the others are internal to the server.
CONTRACTS = ("control", "echovlm", "router", "tensor", "vision")
# In the order of application.
IMPORTS = (
    (r"\bechovlm_ray\.client\b", "echovlm_ray_client"),
    (r"\bechovlm_ray\.tasks\b", "echovlm_ray_client.tasks"),
    (r"\bfrom protos import\b", "from echovlm_ray_client.protos import"),
)
# protobuf's default pool has one file and one message of each name. A service may have its own `protos/tensor.proto`,
# or the server's package in another version. In a separate pool this package conflicts with neither.
POOL = ("_descriptor_pool.Default()", "_own_pool.POOL")
POOL_IMPORT = "from google.protobuf import descriptor_pool as _descriptor_pool\n"
POOL_MODULE = '''\
"""The descriptors of this package's contracts, apart from those of other packages."""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
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
    for source in (*CLIENT.glob("*.py"), TASKS):
        (package / source.name).write_text(_renamed(source.read_text()))
    (package / "py.typed").touch()
    (contracts / "__init__.py").write_text('"""The contracts with the server, and the code generated from them."""\n')
    (contracts / "_own_pool.py").write_text(POOL_MODULE)
    for name in CONTRACTS:
        for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
            text = _renamed((ROOT / "protos" / f"{name}{suffix}").read_text())
            if suffix == "_pb2.py":
                if text.count(POOL[0]) != 1 or text.count(POOL_IMPORT) != 1:
                    raise ValueError(f"protos/{name}_pb2.py does not register its descriptors as it used to")
                text = text.replace(*POOL)
                text = text.replace(POOL_IMPORT, "from echovlm_ray_client.protos import _own_pool\n")
            (contracts / f"{name}{suffix}").write_text(text)
    project = (FOLDER / "pyproject.toml").read_text()
    project = re.sub(
        r"(?m)^#.*\nbuild-backend.*\nbackend-path.*\n", 'build-backend = "setuptools.build_meta"\n', project
    )
    (target / "pyproject.toml").write_text(project)
    shutil.copy(FOLDER / "README.md", target)
    for name in ("LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, target)


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
