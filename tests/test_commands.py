"""Every `python -m` command has a `--help` after `make serve`, and names the extra to install if it needs more."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Packages that serve look for it and go on without it, but do not expect an import that is halted.
OPTIONAL = {"colorama"}
# Started by other processes, with arguments that no person types.
INTERNAL = {"echovlm_ray.vision.decoding.fork_server", "experts.checks.check", "experts.checks.check_fork_server"}
# In one process, because most of the time goes into importing torch. A package whose entry is None cannot be imported.
RUN = """
import contextlib, io, json, os, runpy, sys
missing, calls = json.loads(sys.argv[1])
# A command may lead its standard output elsewhere.
result = os.fdopen(os.dup(1), "w")
sys.modules.update(dict.fromkeys(missing))
answers = []
for module, *arguments in calls:
    sys.argv = [module, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            ended = None
        except SystemExit as stop:
            ended = stop.code
        except Exception as error:
            ended = repr(error)
    answers.append([module, ended, printed.getvalue()])
print(json.dumps(answers), file=result, flush=True)
"""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def commands() -> list[str]:
    """The modules that can be run."""
    folders = ("benchmarks", "docs", "echovlm_ray", "experts", "protos", "requirements", "router")
    sources = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    found = [name_of(path) for path in sources if '\nif __name__ == "__main__":' in path.read_text()]
    return [name for name in found if name not in INTERNAL]


def only_for_tests() -> list[str]:
    """What `make test` installs and `make serve` does not, by the names under which it is imported."""
    listed = re.findall(r"^([\w.-]+)==", (ROOT / "requirements" / "dev.txt").read_text(), re.MULTILINE)
    distributions = {re.sub("[-_.]+", "-", name).lower() for name in listed}
    return [
        name
        for name, owners in packages_distributions().items()
        if {re.sub("[-_.]+", "-", owner).lower() for owner in owners} <= distributions
        and name.isidentifier()
        and name not in OPTIONAL
    ]


def run_without(missing: list[str], calls: list[list[str]]) -> list[tuple[str, object, str]]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([missing, calls])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return [(module, ended, printed) for module, ended, printed in json.loads(done.stdout.splitlines()[-1])]


def test_every_command_helps() -> None:
    missing = only_for_tests()
    assert {"matplotlib", "pytest", "grpc_tools"} <= set(missing)
    names = commands()
    assert {"benchmarks.throughput", "benchmarks.systems.gateway", "protos.generate", "requirements.lock"} <= set(names)
    for module, ended, printed in run_without(missing, [[name, "--help"] for name in names]):
        assert ended == 0, f"python -m {module} --help: {ended}"
        assert printed.startswith("usage: "), f"python -m {module} --help printed: {printed[:200]}"


def drawing_commands() -> set[str]:
    """The benchmarks that draw: those that call `draw`, or a function whose name begins with `plot`."""
    found = set()
    for name in commands():
        tree = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text())
        called = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        if any(function == "draw" or function.startswith("plot") for function in called):
            found.add(name)
    return found


def test_a_benchmark_that_draws_says_what_to_install() -> None:
    names = sorted(drawing_commands())
    assert len(names) >= 8
    needed = {"benchmarks.load": ["--server", "127.0.0.1:1"], "benchmarks.scaling_model": ["--plot"]}
    calls = [[name, *needed.get(name, [])] for name in names]
    for module, ended, printed in run_without(["matplotlib"], calls):
        assert isinstance(ended, str), f"{module}: {ended}"
        assert "`make benchmarks`" in ended, f"{module}: {ended}"
        assert printed == ""


def test_matplotlib_is_imported_in_one_place() -> None:
    importing = [
        name_of(path)
        for path in sorted((ROOT / "benchmarks").rglob("*.py"))
        if re.search(r"^    (import|from) matplotlib\b|^(import|from) matplotlib\b", path.read_text(), re.MULTILINE)
        and "TYPE_CHECKING" not in path.read_text()
    ]
    assert importing == ["benchmarks.drawing"]


@pytest.mark.parametrize("target", ["benchmarks", "client-check", "lock"])
def test_make_has_the_targets_that_texts_name(target: str) -> None:
    assert re.search(rf"^{target}:.*  ## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
