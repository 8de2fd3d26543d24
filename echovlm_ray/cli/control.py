"""Shared by the commands that call Control: the connection, and the text of its errors."""

import functools
import getpass
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from echovlm_ray.cli.credentials import Authority, Certificate, Key, TokenFile, tls_of, token_of
from echovlm_ray.cli.terminal import line
from echovlm_ray.cli.work import fail, finite
from echovlm_ray.client.control import DEFAULT_CONTROL, ExpertControlClient
from echovlm_ray.client.errors import (
    DeadlineExceededError,
    EchoVLMError,
    InternalServerError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)

EXIT_FAILED = 1
EXIT_INVALID = 2
EXIT_UNAVAILABLE = 3
EXIT_CREDENTIALS = 5
EXIT_INTERRUPTED = 130
# gRPC's error for a server that speaks HTTP/1.
SPEAKS_HTTP = "http1"
MAX_ERROR = 2000

Control = Annotated[str, typer.Option(help="host:port of Control.", envvar="ECHORAY_CONTROL")]
SystemName = Annotated[
    str | None,
    typer.Option("--name", help="The system of this name that you run on this machine, instead of --control."),
]
NamedControl = Annotated[str | None, typer.Option(help="host:port of Control, to use a running system.")]
Timeout = Annotated[float, typer.Option(min=0.1, callback=finite, help="Timeout of a call to Control in seconds.")]
Reason = Annotated[str, typer.Option(help="The reason, for the history.")]
Actor = Annotated[
    str | None, typer.Option(envvar="ECHORAY_ACTOR", help="Your name, for the history. [default: your login]")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only show the steps and the memory of every replica; change nothing.")
]
Wait = Annotated[bool, typer.Option("--wait", help="Show the progress until it is done or has failed.")]

_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def with_control(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options for Control to a command, and passes an `ExpertControlClient` as its first argument.

    Errors of a call become one line on stderr and an exit code.
    """
    return _with_control(command, inspect.Parameter("control", _KEYWORD, default=DEFAULT_CONTROL, annotation=Control))


def with_named_control(command: Callable[..., None]) -> Callable[..., None]:
    """Like `with_control`, for a command that calls Control only with `--control`; otherwise the first argument is
    None.
    """
    return _with_control(command, inspect.Parameter("control", _KEYWORD, default=None, annotation=NamedControl))


def actor_of(actor: str | None) -> str:
    """The given name of the operator, or the user's login name."""
    if actor is not None:
        return actor
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        fail("this user has no login name: give --actor", EXIT_INVALID)


@contextmanager
def control_failures(address: str) -> Iterator[None]:
    """Converts errors of Control to one line and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted", EXIT_INTERRUPTED)
    except EchoVLMError as error:
        fail(*explain(error, address))


def explain(error: EchoVLMError, address: str) -> tuple[str, int]:
    """The message for an error, and the exit code."""
    retry_after_s = getattr(error, "retry_after_s", None)
    later = "" if retry_after_s is None else f"; try again in {retry_after_s:g} s"
    match error:
        case InvalidRequestError(violations=[_, *_] as violations):
            return _line("; ".join(map(str, violations))), EXIT_INVALID
        case InvalidRequestError() | NotFoundError():
            return _line(str(error)), EXIT_INVALID
        case DeadlineExceededError():
            return (
                f"no answer from {address} in time: the address may be out of reach, or Control may wait for its "
                "database or its replicas. See `echoray status`, name another Control with --control, or give it more "
                "time with --timeout",
                EXIT_UNAVAILABLE,
            )
        case UnavailableError(reached=False) if SPEAKS_HTTP in str(error):
            return (
                f"what answers at {address} is a web server, not Control: name Control with --control",
                EXIT_UNAVAILABLE,
            )
        case UnavailableError(reached=False) if (pid := _process_of(address)) is not None:
            return (
                f"nothing answers at {address} now, and the system that you run here (process {pid}) does run: it is "
                "starting or stopping, or replaces a Control that was lost. Try again in some seconds",
                EXIT_UNAVAILABLE,
            )
        case UnavailableError(reached=False):
            return (
                f"nothing answers at {address}: start the system with `echoray serve`, or name its Control with "
                "--control (`echoray serve` prints it; with TLS give --ca)",
                EXIT_UNAVAILABLE,
            )
        case UnavailableError() | OverloadedError():
            return _line(f"{error}{later}"), EXIT_UNAVAILABLE
        case UnauthenticatedError():
            return f"{error} (give the token's file with --token-file)", EXIT_CREDENTIALS
        case PermissionDeniedError():
            return _line(str(error)), EXIT_CREDENTIALS
        case EchoVLMError(code=grpc.StatusCode.UNIMPLEMENTED):
            return (
                f"what answers at {address} is not Control: name Control's address, not the gateway's",
                EXIT_UNAVAILABLE,
            )
        case InternalServerError():
            return _line(f"{error} (request {error.request_id})"), EXIT_FAILED
        case _:
            return _line(str(error)), EXIT_FAILED


def _process_of(address: str) -> int | None:
    """The process of this user's local system whose Control has this address, if there is one."""
    from echovlm_ray.cli.state import running_systems

    try:
        return next((system.pid for system in running_systems() if system.control == address), None)
    except (ValueError, OSError):
        return None


def _with_control(command: Callable[..., None], control: inspect.Parameter) -> Callable[..., None]:
    connection = [
        control,
        inspect.Parameter("name", _KEYWORD, default=None, annotation=SystemName),
        inspect.Parameter("token_file", _KEYWORD, default=None, annotation=TokenFile),
        inspect.Parameter("ca", _KEYWORD, default=None, annotation=Authority),
        inspect.Parameter("certificate", _KEYWORD, default=None, annotation=Certificate),
        inspect.Parameter("key", _KEYWORD, default=None, annotation=Key),
        inspect.Parameter("timeout", _KEYWORD, default=30.0, annotation=Timeout),
    ]
    signature = inspect.signature(command)
    own = list(signature.parameters.values())[1:]

    @functools.wraps(command)
    def connected(*arguments: Any, **options: Any) -> None:
        named = {parameter.name: options.pop(parameter.name) for parameter in connection}
        if (name := named.pop("name")) is not None:
            named["control"] = control_of(name)
        if named["control"] is None:
            command(None, *arguments, **options)
            return
        with _open(**named) as client, control_failures(client.address):
            command(client, *arguments, **options)

    # Typer reads the options from these.
    connected.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[parameter.replace(kind=_KEYWORD) for parameter in own] + connection
    )
    connected.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *connection]}
    return connected


def _open(
    control: str,
    token_file: Path | None,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    timeout: float,
) -> ExpertControlClient:
    try:
        return ExpertControlClient(
            control, token=token_of(token_file), tls=tls_of(ca, certificate, key), timeout_s=timeout
        )
    except (ValueError, OSError) as error:
        fail(_line(str(error)), EXIT_INVALID)


def control_of(name: str) -> str:
    """The address of the Control of this user's local system; ends the command if there is none."""
    from echovlm_ray.cli.state import system_named

    try:
        return system_named(name).control
    except ValueError as error:
        fail(_line(str(error)), EXIT_INVALID)


def _line(text: str) -> str:
    return line(text, MAX_ERROR)
