"""A benchmark's gateway: a running one, or that of a system started for the measurement."""

import argparse
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from benchmarks.systems.protocol import MeasuredSystem


def add_gateway_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--server` and `--start`; one of them is required."""
    system = parser.add_mutually_exclusive_group(required=True)
    system.add_argument("--server", help="a gateway that runs, host:port")
    system.add_argument("--start", type=Path, metavar="CHECKPOINT", help="start a system on this split folder")


def gateway_of(options: argparse.Namespace, console: Console, stack: ExitStack) -> str:
    """The address of the gateway that the options name; a system that is started ends with the stack.

    Raises:
        SystemFailedError: it cannot be started.
    """
    if options.server:
        return str(options.server)
    arguments = ["-m", "benchmarks.systems.gateway", "--checkpoint", str(options.start.absolute())]
    with console.status("starting the system"):
        system = stack.enter_context(MeasuredSystem(arguments, {}))
        return str(system.wait_until_ready()["address"])
