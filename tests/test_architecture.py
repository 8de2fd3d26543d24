"""Holds the shape of the repository: which package may import which, and what a light process must not load."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each package may import itself and those before it.
LAYERS = ("protos", "experts", "router", "echovlm_ray")
# The rooms of the server, each with what it may import of the others: those before it.
ROOMS = ("core", "grpc", "cluster", "vision", "lm", "gates", "control", "deploy")
HEAVY = {"ray", "torch", "transformers"}


def imported_modules(path: Path, *, for_types: bool = True) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    if not for_types:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer they reach into"
            yield node.module or ""


def sources(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no sources in {package}"
    return files


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer: str) -> None:
    forbidden = set(LAYERS[LAYERS.index(layer) + 1 :])
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources(layer)
        for module in imported_modules(path)
        if module.split(".")[0] in forbidden
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_of_the_server_import_one_way() -> None:
    serving = ROOT / "echovlm_ray" / "serving"
    assert {path.parent.name for path in serving.glob("*/__init__.py")} == set(ROOMS)
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for room in ROOMS
        for path in sources(f"echovlm_ray/serving/{room}")
        for module in imported_modules(path)
        if module.startswith("echovlm_ray.serving.") and ROOMS.index(module.split(".")[2]) > ROOMS.index(room)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", LAYERS)
def test_parts_of_a_package_do_not_import_in_circles(package: str) -> None:
    """A part is a folder or a module directly below the package; what types alone need does not count."""
    imports: dict[str, set[str]] = {}
    for path in sources(package):
        own = path.relative_to(ROOT / package).with_suffix("").parts[0]
        for module in imported_modules(path, for_types=False):
            names = module.split(".")
            if names[0] == package and len(names) > 1 and names[1] != own:
                imports.setdefault(own, set()).add(names[1])
    TopologicalSorter(imports).prepare()


@pytest.mark.parametrize(
    ("layer", "libraries"), [("protos", HEAVY), ("experts", HEAVY - {"torch"}), ("router", HEAVY - {"torch"})]
)
def test_lower_layers_stay_light(layer: str, libraries: set[str]) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources(layer)
        for module in imported_modules(path)
        if module.split(".")[0] in libraries
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["echovlm_ray", "echovlm_ray.client", "echovlm_ray.config", "echovlm_ray.cli.main"])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.split() == []


@pytest.mark.parametrize(
    ("part", "unneeded"),
    [
        ("gateway", {"torch", "transformers", "sqlalchemy"}),
        ("control", {"torch", "transformers"}),
        ("expert_group", {"transformers", "sqlalchemy"}),
        ("router", {"sqlalchemy", "alembic"}),
    ],
)
def test_a_replica_does_not_load_what_its_part_does_not_need(part: str, unneeded: set[str]) -> None:
    """Each of these takes 20 to 120 MB of every process that imports it, and seconds of its start."""
    deployment = ROOT / "echovlm_ray" / "serving" / "deploy" / f"{part}_deployment.py"
    modules = sorted(module for module in imported_modules(deployment) if module.split(".")[0] in LAYERS)
    code = f"import sys, {', '.join(modules)}; print(*sorted({unneeded!r} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.split() == []


def test_nothing_private_of_grpcio_is_used() -> None:
    """Of what grpcio's own generator writes there is no choice."""
    private = re.compile(r"(from|import) grpc(\.\w+)*\._|from grpc(\.\w+)* import .*\b_|cygrpc")
    files = [path for package in LAYERS for path in sources(package) if not path.name.endswith("_pb2_grpc.py")]
    assert not [str(path.relative_to(ROOT)) for path in files if private.search(path.read_text())]


def test_channels_are_opened_in_two_places_only() -> None:
    """One for the parts among themselves, one for clients: each with its options, proxy and secret in one place."""
    opening = re.compile(r"grpc\.(aio\.)?(in)?secure_channel\b")
    found = {
        str(path.relative_to(ROOT))
        for package in LAYERS
        for path in sources(package)
        if opening.search(path.read_text())
    }
    assert found == {"experts/transport/inner_channel.py", "echovlm_ray/client/connection.py"}
