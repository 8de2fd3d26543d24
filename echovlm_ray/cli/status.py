"""`echoray status`: what runs where, from Control. Only the client's packages."""

import json
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import grpc
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from echovlm_ray.cli.credentials import Authority, Certificate, Key, TokenFile, tls_of, token_of
from echovlm_ray.client.connection import LOOPBACK, TLS, call_metadata, check_connection
from protos import status_pb2, status_pb2_grpc

if TYPE_CHECKING:
    from protos.status_pb2 import ApplicationStatus, GetStatusResponse, ReplicaDescription

EXIT_FAILED = 1
EXIT_INVALID = 2
EXIT_UNAVAILABLE = 3
EXIT_CREDENTIALS = 5
DEFAULT_CONTROL = "127.0.0.1:50052"
RUNNING = "RUNNING"
MEBIBYTE = 1024 * 1024


def status(
    control: Annotated[str, typer.Option(help="host:port of Control.", envvar="ECHORAY_CONTROL")] = DEFAULT_CONTROL,
    token_file: TokenFile = None,
    ca: Authority = None,
    certificate: Certificate = None,
    key: Key = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Give up after this many seconds.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    name: Annotated[
        str | None, typer.Option(help="The system of this name that you run on this machine, instead of --control.")
    ] = None,
) -> None:
    """Shows every part: its replicas, their addresses and processes, expert versions, queues and memory.

    Exit status: 0 all is well; 1 something is not; 2 wrong options; 3 nothing answers; 5 credentials.

    Example: `echoray status`
    """
    try:
        control = control if name is None else control_of(name)
        found = _ask(control, token_of(token_file), tls_of(ca, certificate, key), timeout)
    except (ValueError, OSError) as error:
        _fail(str(error), EXIT_INVALID)
    except grpc.RpcError as error:
        _fail(*_explain(error, control))
    if as_json:
        typer.echo(json.dumps(_as_dict(found), indent=2))
    else:
        _print(found)
    if found.notices or any(application.status != RUNNING for application in found.applications):
        raise typer.Exit(EXIT_FAILED)


def _ask(control: str, token: str | None, tls: TLS | None, timeout: float) -> "GetStatusResponse":
    check_connection(control, token, tls)
    options = [("grpc.enable_http_proxy", 0)] if LOOPBACK.match(control) else []
    if tls is None:
        channel = grpc.insecure_channel(control, options=options)
    else:
        channel = grpc.secure_channel(control, tls.credentials(), options=options)
    with channel:
        _, metadata = call_metadata(token, None)
        stub = status_pb2_grpc.SystemStatusStub(channel)
        response: GetStatusResponse = stub.GetStatus(status_pb2.GetStatusRequest(), timeout=timeout, metadata=metadata)
        return response


def _explain(error: grpc.RpcError, control: str) -> tuple[str, int]:
    code, details = error.code(), error.details()
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return f"{details} (give the token's file with --token-file)", EXIT_CREDENTIALS
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return (
            f"nothing answers at {control}: start the system with `echoray serve`, or name its Control with --control "
            "(`echoray serve` prints it; with TLS give --ca)",
            EXIT_UNAVAILABLE,
        )
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return f"what answers at {control} is not Control: name Control's address, not the gateway's", EXIT_UNAVAILABLE
    return f"{code.name}: {details}", EXIT_FAILED


def _as_dict(found: "GetStatusResponse") -> dict[str, Any]:
    return {
        "expert_set_id": found.expert_set_id,
        "identity": found.identity,
        "notices": list(found.notices),
        "applications": [
            {
                "name": application.name,
                "status": application.status,
                "message": application.message,
                "replicas": [_replica_as_dict(replica) for replica in application.replicas],
            }
            for application in found.applications
        ],
    }


def _replica_as_dict(replica: "ReplicaDescription") -> dict[str, Any]:
    # Not protobuf's own JSON, in which 64-bit numbers are strings.
    return {
        "deployment": replica.deployment,
        "replica_id": replica.replica_id,
        "endpoint": replica.endpoint,
        "node": replica.node,
        "pid": replica.pid,
        "device": replica.device,
        "resident_bytes": replica.resident_bytes,
        "queue_length": replica.queue_length,
        "organ": replica.organ,
        "bundles": [
            {
                "digest": bundle.digest,
                "name": bundle.name,
                "version": bundle.version,
                "resident_bytes": bundle.resident_bytes,
                "kernel": bundle.kernel,
            }
            for bundle in replica.bundles
        ],
    }


def _print(found: "GetStatusResponse") -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        # A pipe has no width to fit into, and an address that is cut off is of no use.
        console = Console(highlight=False, width=200)
    nodes = {replica.node for application in found.applications for replica in application.replicas if replica.pid}
    table = Table(box=None, pad_edge=False)
    for name in ("application", "status", "endpoint", *(["node"] if len(nodes) > 1 else [])):
        table.add_column(name, overflow="fold")
    for name in ("pid", "device", "memory", "queue"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("experts", overflow="fold")
    for application in found.applications:
        for row in _rows(application, with_node=len(nodes) > 1):
            table.add_row(*row)
    console.print(table)
    console.print(f"expert set {found.expert_set_id[:12]}" + (f" on {min(nodes)}" if len(nodes) == 1 else ""))
    for notice in found.notices:
        console.print(f"[red]{escape(notice)}[/red]", soft_wrap=True)
    for application in found.applications:
        if application.status != RUNNING and application.message:
            console.print(f"{application.name}: {escape(application.message)}", soft_wrap=True)


def control_of(name: str) -> str:
    """Where the Control of a system of this user's on this machine listens.

    Raises:
        ValueError: there is no such system.
    """
    from echovlm_ray.cli.state import system_named

    return system_named(name).control


def _rows(application: "ApplicationStatus", *, with_node: bool) -> list[list[str]]:
    style = "green" if application.status == RUNNING else "red"
    head = [application.name, f"[{style}]{escape(application.status)}[/{style}]"]
    rows = []
    for replica in application.replicas:
        row = [*head, replica.endpoint, *([replica.node] if with_node else [])]
        if replica.pid:
            memory = f"{replica.resident_bytes / MEBIBYTE:.0f} MiB"
            row += [str(replica.pid), replica.device, memory, str(replica.queue_length)]
            row.append(", ".join(bundle.version for bundle in replica.bundles))
        else:
            row += ["[red]silent[/red]", "", "", ""]
        rows.append(row)
        head = ["", ""]
    return rows or [head]


def _fail(text: str, code: int) -> NoReturn:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {escape(text)}")
    raise typer.Exit(code)
