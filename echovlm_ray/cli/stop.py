"""`echoray stop`: ends a system that another shell started."""

import time
from typing import Annotated, NoReturn

import typer

from echovlm_ray.cli.terminal import say

EXIT_FAILED = 1
EXIT_INVALID = 2
# Longer than the longest orderly end that is usual: the grace time of running requests twice, and Ray's own end.
WAIT_S = 60.0
POLL_S = 0.1


def stop(
    address: Annotated[
        str | None, typer.Option(help="Remove the system from this Ray cluster instead, e.g. auto.")
    ] = None,
    pid: Annotated[int | None, typer.Option(help="Which `echoray serve`, where there are several.")] = None,
    name: Annotated[
        str | None, typer.Option(help="The system of this name, as `echoray serve --name` gave it.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
) -> None:
    """Stops the system that `echoray serve` runs on this machine; running requests may finish.

    Exit status: 0 it is down; 1 it did not end; 2 there is none, or there are several.

    Example: `echoray stop`
    """
    if address is not None:
        _stop_on_cluster(address, name or "")
        return
    from echovlm_ray.cli.state import running_systems

    found = running_systems()
    chosen = [
        system
        for system in found
        if everything or (pid in (None, system.pid) and (name is None or name == system.name))
    ]
    if not chosen:
        what = (f" as process {pid}" if pid else "") + (f" by the name {name!r}" if name is not None else "")
        _fail("no EchoVLM-Ray of yours runs on this machine" + what, EXIT_INVALID)
    if len(chosen) > 1 and not everything:
        names = [f"{system.name}, " if system.name else "" for system in chosen]
        lines = [
            f"  {system.pid}: {called}{system.checkpoint}, control at {system.control}"
            for called, system in zip(names, chosen, strict=True)
        ]
        _fail("\n".join(["several run; say which with --pid or --name, or --all:", *lines]), EXIT_INVALID)
    for system in chosen:
        if (process := system.process) is not None:
            process.terminate()
    deadline = time.monotonic() + WAIT_S
    while alive := [system.pid for system in chosen if system.process is not None]:
        if time.monotonic() > deadline:
            pids = ", ".join(map(str, alive))
            _fail(f"process {pids} has not ended after {WAIT_S:.0f} s; call again to stop it at once", EXIT_FAILED)
        time.sleep(POLL_S)
    say(f"Stopped {', '.join(str(system.pid) for system in chosen)}.")


def _stop_on_cluster(address: str, name: str) -> None:
    from echovlm_ray.serving.deploy.app import names_on_cluster, remove_from_cluster

    try:
        removed = remove_from_cluster(address, name)
        others = () if removed else names_on_cluster(address)
    except ConnectionError as error:
        _fail(str(error), EXIT_FAILED)
    if not removed:
        named = [other or "the one without a name" for other in others]
        there = f"; it runs {', '.join(named)}: say which with --name" if named else ""
        called = f" by the name {name!r}" if name else ""
        _fail(f"no EchoVLM-Ray runs{called} on the cluster at {address}{there}", EXIT_INVALID)
    say(f"Removed {', '.join(removed)}.")


def _fail(text: str, code: int) -> NoReturn:
    say(f"error: {text}", err=True)
    raise typer.Exit(code)
