"""Runs `echoray experts` against a system."""

import json
from typing import Any

from typer.testing import CliRunner, Result

from echovlm_ray.cli.experts import app
from tests.cli.control_server import System


def invoke(system: System, *arguments: object) -> Result:
    result = CliRunner().invoke(app, [*map(str, arguments), "--control", system.address])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def done(system: System, *arguments: object) -> str:
    """Runs a command that must succeed; its stdout without line breaks."""
    result = invoke(system, *arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def done_json(system: System, *arguments: object) -> Any:
    return json.loads(done(system, *arguments, "--json"))


def refused(system: System, *arguments: object, code: int) -> str:
    """Runs a command that must fail with one line on stderr."""
    result = invoke(system, *arguments)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr
