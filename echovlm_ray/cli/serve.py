"""`echoray serve`: starts the whole system and serves until Ctrl-C."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from echovlm_ray.cli.credentials import options_for
from echovlm_ray.cli.readiness import notify_ready
from echovlm_ray.cli.signals import EXIT_KILLED, StopRequest
from echovlm_ray.cli.terminal import MAX_CELL, console_of, line, styled
from echovlm_ray.client.connection import DEFAULT_ADDRESS

if TYPE_CHECKING:
    from echovlm_ray.config import Config
    from echovlm_ray.serving.cluster.rollout_files import RolloutFiles
    from echovlm_ray.serving.deploy.app import RunningSystem

EXIT_FAILED = 1
EXIT_INVALID = 2
DEFAULT_CONTROL = "127.0.0.1:50052"


def serve(
    config: Annotated[Path | None, typer.Option(help="YAML file; see cluster/local.yaml for every field.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder that `echoray checkpoint split` or `demo` made; wins over the file.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Join this Ray cluster instead of starting a local Ray, e.g. auto.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="With --address: leave the system running on the cluster and return.")
    ] = False,
    name: Annotated[
        str, typer.Option(help="Of the system: several run side by side on one cluster by name, e.g. team-a.")
    ] = "",
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Replace another system of this name, or another's database.")
    ] = False,
    begin_anew: Annotated[
        bool, typer.Option("--begin-anew", help="Begin from the checkpoint's experts where the database is missing.")
    ] = False,
    insecure_ray: Annotated[
        bool, typer.Option("--insecure-ray", help="Start although RAY_AUTH_MODE turns Ray's own token off.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start again when Ray dies, after 1 to 60 seconds.")
    ] = False,
) -> None:
    """Starts the gateway, the vision encoder, the router, one expert group per organ and Control, and serves.

    Ctrl-C lets running requests finish and takes everything down; a second Ctrl-C does not wait. On a joined cluster
    only what was started here is removed.

    Exit status: 0 stopped; 1 a part failed; 2 the configuration cannot be used; 3 Ray or its cluster was lost; 4
    another `echoray serve` took over; 130 stopped before it was ready.

    Example: `echoray serve --checkpoint checkpoints/demo`
    """
    console = console_of()
    console.soft_wrap = True
    if detach and address is None:
        _fail("--detach needs --address: a local Ray ends with this command", EXIT_INVALID)
    if detach and restart:
        _fail("--restart needs a command that stays: leave --detach away", EXIT_INVALID)
    with _failures():
        from echovlm_ray.cli.state import announced
        from echovlm_ray.cli.supervisor import supervised
        from echovlm_ray.config_file import load_system_config
        from echovlm_ray.hosts import host_port
        from echovlm_ray.serving.cluster.ray_auth import check_ray_auth
        from echovlm_ray.serving.cluster.system_id import check_name

        check_ray_auth(insecure=insecure_ray)
        parsed = load_system_config(config, checkpoint)
        options = _Options(address, detach, check_name(name), take_over, begin_anew)
        where = {"name": name, "address": address or "", "database": _database_of(parsed)}
        control, gateway = (host_port(section.host, section.port) for section in (parsed.control, parsed.gateway))
        # Held here, above the process that serves: it lasts over a restart.
        with ExitStack() as held:
            if not address:
                held.enter_context(_alone(parsed))
            if not detach:
                held.enter_context(announced(str(parsed.model.checkpoint), control, gateway, **where))
            code = supervised(
                partial(_serve_below, parsed, options, console, held),
                restart=restart,
                say=partial(_say, console),
                leave=partial(_show_cursor, console),
            )
    raise typer.Exit(code)


@contextmanager
def _alone(config: "Config") -> Iterator[None]:
    """Refuses what another `echoray serve` of this machine is about to use, even if it has only begun to start."""
    from echovlm_ray.cli.state import claimed
    from echovlm_ray.serving.cluster.held_file import remove_if_free

    resources = {
        f"port {section.port}": f"set {name}.port to another port, or to 0 for any free one"
        for name, section in (("gateway", config.gateway), ("control", config.control))
        if section.port
    }
    with ExitStack() as left:
        if config.router.experts == "remote":
            files = _rollout_files(config)
            resources = {f"the rollouts' database {files.base}": "set rollouts.database to another one", **resources}
            # A Control that was killed has left it.
            left.callback(remove_if_free, files.lock)
        with claimed(resources):
            yield


def _rollout_files(config: "Config") -> "RolloutFiles":
    from echovlm_ray.serving.cluster.rollout_files import RolloutFiles
    from echovlm_ray.serving.deploy.preflight import resolve_paths

    resolved = resolve_paths(config)
    return RolloutFiles.of(resolved.rollouts, resolved.model.checkpoint)


def _database_of(config: "Config") -> str:
    """The file of the rollouts' database, for `echoray experts backup`; "" where there is none."""
    if config.router.experts == "local":
        return ""
    files = _rollout_files(config)
    return str(files.base) if files.is_file else ""


@dataclass(frozen=True, slots=True)
class _Options:
    """What the command line says beside the configuration."""

    address: str | None
    detach: bool
    name: str
    take_over: bool
    begin_anew: bool


def _serve_below(config: "Config", options: _Options, console: Console, held: ExitStack, supervisor: int) -> int:
    """Serves in a process below the one that the user sees; returns its exit status."""
    above = os.getppid()
    try:
        with _failures():
            return _serve(config, options, console, supervisor)
        return EXIT_FAILED
    finally:
        if os.getppid() != above:
            # The process above was killed, and so has not removed what it holds.
            held.close()


def _serve(config: "Config", options: _Options, console: Console, supervisor: int) -> int:
    from echovlm_ray.cli.state import ready_at
    from echovlm_ray.cli.supervisor import EXIT_LOST, EXIT_REPLACED, end_family

    deployed = threading.Event()

    def stop() -> None:
        _say(console, "\nStopping; requests under way may finish. Ctrl-C again to stop at once.")
        if options.address is None and not deployed.is_set():
            # Nothing runs yet that must end in order, and Ray's own start cannot be interrupted.
            end_family()
            os._exit(EXIT_KILLED)

    request = StopRequest(stop, end_family)
    taken = threading.Event()

    def lost(problem: str) -> None:
        # Whatever waits for Ray now would wait for minutes, so the process ends from this thread, and what Ray's own
        # code writes on the standard error meanwhile does not help. A service manager may have ended Ray's processes
        # together with this one; then the wish to stop is about to arrive.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stderr.fileno())
        if not request.wait(1.0):
            _say(console, styled("error:", "red"), line(f"{problem}; everything is taken down."))
        end_family()
        os._exit(0 if request() else EXIT_LOST)

    def replaced(what: str, by_another: bool) -> None:
        if by_another:
            taken.set()
        if not request():
            _say(console, styled(line(f"{what}."), "yellow"))
            request.ask()

    # What this process and Ray's make, files and logs, is for this user alone.
    os.umask(0o077)
    with request.following(supervisor):
        # Everything that needs no Ray is checked before the seconds that loading it takes.
        _check(config, options)
        from echovlm_ray.serving.deploy.app import serve_system

        with (
            _no_exit_from_ray(request),
            _progress(console, deployed) as progress,
            serve_system(
                config,
                address=options.address,
                keep=options.detach,
                name=options.name,
                take_over=options.take_over,
                progress=progress,
                stopping=request,
                lost=lost,
                replaced=replaced,
            ) as system,
        ):
            progress({})
            _print_ready(system, config, console, options)
            ready_at(os.getppid(), system.control_address, system.gateway_address)
            notify_ready()
            if not options.detach:
                request.wait()
    named = f" --name {options.name}" if options.name else ""
    left = f"Left running; `{_command()} stop --address {options.address}{named}` removes it."
    _say(console, left if options.detach else "Stopped.")
    return EXIT_REPLACED if taken.is_set() else 0


def _check(config: "Config", options: _Options) -> None:
    from echovlm_ray.serving.deploy import preflight

    resolved = preflight.resolve_paths(config)
    if options.begin_anew:
        preflight.begin_anew(resolved)
    preflight.check(resolved, local=options.address is None, take_over=options.take_over)


def _say(console: Console, *texts: str | Text) -> None:
    # The terminal may be gone.
    with suppress(OSError):
        console.print(*texts)


def _show_cursor(console: Console) -> None:
    """A process that ends at once leaves the terminal as its progress had it."""
    with suppress(OSError):
        console.show_cursor()


@contextmanager
def _no_exit_from_ray(request: StopRequest) -> Iterator[None]:
    """While it starts, Ray answers SIGTERM by ending the process with a status of its own; this one is ours."""
    try:
        yield
    except SystemExit:
        # The wish to stop may still be on its way from the process above.
        if not request.wait(1.0):
            raise
        raise typer.Exit(EXIT_KILLED) from None


@contextmanager
def _progress(console: Console, deployed: threading.Event) -> Iterator[Callable[[Mapping[str, bool]], None]]:
    """Shows which parts are up: on a terminal in one line that changes, otherwise a line for each part.

    The event is set once there are parts.
    """
    started = time.monotonic()
    seen: set[str] = set()
    status = console.status("Starting Ray …") if console.is_terminal else None
    if status is not None:
        status.start()
    else:
        console.print("Starting Ray …")

    def show(states: Mapping[str, bool]) -> None:
        deployed.set()
        up = {name for name, listening in states.items() if listening}
        waiting = [name for name in states if name not in up]
        if status is None:
            for name in sorted(up - seen):
                console.print(f"  {name} is up after {time.monotonic() - started:.1f} s")
        elif not states:
            status.stop()
        else:
            text = f"waiting for {', '.join(waiting)}" if waiting else "connecting the parts"
            status.update(f"{len(up)} of {len(states)} parts are up after {time.monotonic() - started:.0f} s; {text}")
        seen.update(up)

    try:
        yield show
    finally:
        if status is not None:
            status.stop()


def _print_ready(system: "RunningSystem", config: "Config", console: Console, options: _Options) -> None:
    from echovlm_ray.serving.cluster.ray_folder import logs_of_this_process
    from echovlm_ray.serving.cluster.ray_session import metrics_addresses

    logs = logs_of_this_process()
    index, expert_set = system.served.index, system.served.expert_set
    gateway = ", ".join(sorted(set(system.gateway_addresses)))
    organs = ", ".join(
        f"{organ} {version or '(version unknown)'}" + (" (NOT SERVING)" if organ in system.unanswered else "")
        for organ, version in system.served.versions.items()
    )
    console.print(styled("Ready", "bold green"), f"after {system.start_s:.0f} s.")
    rows = {
        "gateway": f"{gateway} ({_access(config.gateway)})",
        "control": f"{system.control_address} ({_access(config.control)})",
        **({"logs": str(logs)} if logs is not None else {}),
        "metrics": ", ".join(f"http://{found}/metrics" for found in metrics_addresses()) or "none",
        "deployment": system.served.identity[:12] + (f", {options.name}" if options.name else ""),
        "checkpoint": f"{system.served.directory}: {index.name} {index.version}",
        "experts": f"set {expert_set.id[:12]}, routing {expert_set.routing}",
        "organs": organs,
    }
    for name, text in rows.items():
        console.print(f"  {name:<11} {line(text)}")
    if index.description:
        console.print(f"  {line(index.description, MAX_CELL)}", style="dim")
    if missing := system.served.missing_text_files:
        console.print(
            styled(f"The checkpoint has no {' and no '.join(missing)}", "yellow"),
            "in its backbone/ folder, so the gateway cannot answer: only the router can be called, with token ids.",
        )
    command = _command()
    if system.unanswered:
        console.print(
            styled(f"{', '.join(system.unanswered)} cannot be answered now:", "red"), f"`{command} status` says why."
        )
    server = "" if system.gateway_address == DEFAULT_ADDRESS else f" --server {system.gateway_address}"
    control = "" if system.control_address == DEFAULT_CONTROL else f" --control {system.control_address}"
    console.print("Next, in another shell (any DICOM, still or video of an ultrasound):")
    for text in (
        f"generate IMAGE --task report{server}{options_for(config.gateway)}",
        f"status{control}{options_for(config.control)}",
    ):
        console.print(f"  {command} {text}", style="bold", soft_wrap=True)
    if not options.detach:
        console.print("Ctrl-C stops it.")


def _access(section: Any) -> str:
    encryption = "no TLS"
    if section.tls is not None:
        encryption = "TLS, client certificates" if section.tls.client_authority else "TLS"
    return encryption + (", token" if section.token_file else "")


def _command() -> str:
    """How to call this command from where the user is."""
    found = shutil.which("echoray")
    own = Path(sys.argv[0]).absolute()
    if found is not None and Path(found).absolute() == own:
        return "echoray"
    try:
        return str(own.relative_to(Path.cwd()))
    except ValueError:
        return str(own)


@contextmanager
def _failures() -> Iterator[None]:
    """One clear text and one exit code for each way not to start."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except ValueError as error:
        _fail(str(error), EXIT_INVALID)
    except Exception as error:
        # Told by name, so that a command that only says what is wrong does not load Ray to know its errors.
        name = type(error).__name__
        if name == "StoppedError":
            raise typer.Exit(EXIT_KILLED) from None
        if name == "StartError" or isinstance(error, ConnectionError):
            _fail(str(error), EXIT_FAILED)
        raise


def _fail(text: str, code: int) -> NoReturn:
    console_of(stderr=True).print(styled("error:", "red"), text, soft_wrap=True)
    raise typer.Exit(code)
