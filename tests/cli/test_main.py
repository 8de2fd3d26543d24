import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from echovlm_ray.cli.main import app

ROOT = Path(__file__).parent.parent.parent


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("serve", "status", "stop", "generate", "info", "checkpoint"):
        assert command in result.output
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == f"echoray {metadata.version('echovlm-ray')}"


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [(["serve"], "psutil"), (["stop"], "psutil"), (["stop", "--address", "auto"], "ray")],
    ids=" ".join,
)
def test_a_command_whose_packages_are_missing_says_what_to_install(arguments: list[str], missing: str) -> None:
    # A finder in front of all others makes the installed packages of the extra look absent.
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"ray", "torch", "transformers", "psutil", "yaml", "grpc_health", "safetensors"}}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = ["echoray", *{arguments!r}]
from echovlm_ray.cli.main import app
app()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert "pip install 'echovlm-ray[serve]'" in done.stderr
    assert missing in done.stderr or "ray" in done.stderr or "grpc_health" in done.stderr
    assert "Traceback" not in done.stderr
