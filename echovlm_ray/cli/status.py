"""`echoray status`: the status of all parts, from Control. Needs only the client's packages."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import grpc
import typer
from rich.text import Text

from echovlm_ray.cli.control import SystemName, control_of, explain
from echovlm_ray.cli.credentials import Authority, Certificate, Key, TokenFile, tls_of, token_of
from echovlm_ray.cli.messages import message_as_dict
from echovlm_ray.cli.organ_problem import NO_ANSWER, format_problem, problem_as_dict
from echovlm_ray.cli.tables import Listing
from echovlm_ray.cli.terminal import console_of, line, name_of, say_json, styled
from echovlm_ray.cli.work import finite
from echovlm_ray.client.connection import TLS, call_metadata, check_connection, open_channel
from echovlm_ray.client.errors import EchoVLMError, from_rpc_error
from protos import status_pb2, status_pb2_grpc

if TYPE_CHECKING:
    from protos.control_pb2 import OrganProblem
    from protos.expert_pb2 import ResidentBundle
    from protos.status_pb2 import ApplicationStatus, GetStatusResponse

EXIT_FAILED = 1
EXIT_INVALID = 2
DEFAULT_CONTROL = "127.0.0.1:50052"
RUNNING = "RUNNING"
EXPERT_PREFIX = "expert-"
MEBIBYTE = 1024 * 1024


def status(
    control: Annotated[str, typer.Option(help="host:port of Control.", envvar="ECHORAY_CONTROL")] = DEFAULT_CONTROL,
    token_file: TokenFile = None,
    ca: Authority = None,
    certificate: Certificate = None,
    key: Key = None,
    timeout: Annotated[float, typer.Option(min=0.1, callback=finite, help="Timeout in seconds.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    name: SystemName = None,
) -> None:
    """Shows every part with its replicas, addresses, processes, expert versions, queues and memory.

    Below the table are the organs whose requests cannot be answered by all of their replicas, with the reasons.

    Exit status: 0 no problem; 1 a part is not running, or requests for an organ cannot be answered; 2 invalid options;
    3 Control does not answer; 5 credentials.

    Example: `echoray status`
    """
    try:
        control = control if name is None else control_of(name)
        found = _ask(control, token_of(token_file), tls_of(ca, certificate, key), timeout)
    except (ValueError, OSError) as error:
        _fail(str(error), EXIT_INVALID)
    except EchoVLMError as error:
        _fail(*explain(error, control))
    if as_json:
        say_json(_as_dict(found), indent=2)
    else:
        _print(found)
    stopped = any(application.status != RUNNING for application in found.applications)
    if found.notices or stopped or any(not problem.holding for problem in found.problems):
        raise typer.Exit(EXIT_FAILED)


def _ask(control: str, token: str | None, tls: TLS | None, timeout: float) -> "GetStatusResponse":
    check_connection(control, token, tls)
    with open_channel(control, tls) as channel:
        request_id, metadata = call_metadata(token, None)
        stub = status_pb2_grpc.SystemStatusStub(channel)
        try:
            response: GetStatusResponse = stub.GetStatus(
                status_pb2.GetStatusRequest(), timeout=timeout, metadata=metadata
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, control, request_id, service="Control") from None
        return response


def _as_dict(found: "GetStatusResponse") -> dict[str, Any]:
    return message_as_dict(found) | {"problems": [problem_as_dict(problem) for problem in found.problems]}


def _print(found: "GetStatusResponse") -> None:
    console = console_of()
    nodes = {replica.node for application in found.applications for replica in application.replicas if replica.pid}
    numbers = ("pid", "device", "memory", "queue")
    where = ["endpoint", *(["node"] if len(nodes) > 1 else [])]
    table = Listing("application", "status", *where, *numbers, "experts", right=numbers)
    for application in found.applications:
        for row in _rows(application, found.problems, with_node=len(nodes) > 1):
            table.add_row(*row)
    console.print(table)
    console.print(line(f"expert set {found.expert_set_id[:12]}" + (f" on {min(nodes)}" if len(nodes) == 1 else "")))
    for text in _arithmetic(found):
        console.print(line(text), soft_wrap=True)
    for application in found.applications:
        if refused := _refused(application):
            console.print(line(f"{application.name} refused {refused}"), soft_wrap=True)
    for notice in found.notices:
        console.print(styled(line(notice), "red"), soft_wrap=True)
    for application in found.applications:
        if application.status != RUNNING and application.message:
            console.print(line(f"{application.name}: {application.message}"), soft_wrap=True)
        for replica in application.replicas:
            # The problems of expert replicas are among the organs' problems.
            if replica.problem and not replica.organ:
                console.print(line(f"{application.name}: {replica.problem}"), soft_wrap=True)
    for problem in found.problems:
        console.print(format_problem(problem), soft_wrap=True)


def _refused(application: "ApplicationStatus") -> str:
    """The calls that its replicas refused since they started, the most frequent reason first."""
    counts: Counter[str] = Counter()
    for replica in application.replicas:
        for refused in replica.refusals:
            counts[f"{refused.reason}{f' of {refused.caller}' if refused.caller else ''}"] += refused.count
    return ", ".join(f"{count} ({what})" for what, count in counts.most_common())


def _arithmetic(found: "GetStatusResponse") -> list[str]:
    """The libraries for products on the CPU; if they differ, with the parts that use them."""
    applications: dict[str, list[str]] = {}
    for application in found.applications:
        for replica in application.replicas:
            if replica.arithmetic:
                names = applications.setdefault(replica.arithmetic, [])
                names += [application.name] * (application.name not in names)
    if len(applications) == 1:
        return [f"products on the CPU by {arithmetic}" for arithmetic in applications]
    return [f"products on the CPU of {', '.join(names)} by {text}" for text, names in applications.items()]


def _rows(
    application: "ApplicationStatus", problems: "Iterable[OrganProblem]", *, with_node: bool
) -> list[list[str | Text]]:
    status = application.status
    if status == RUNNING and any(
        application.name == f"{EXPERT_PREFIX}{problem.organ}" and not problem.holding for problem in problems
    ):
        # Its processes run, but it does not answer.
        status = NO_ANSWER
    style = "green" if status == RUNNING else "red"
    head: list[str | Text] = [name_of(application.name), styled(name_of(status), style)]
    rows = []
    for replica in application.replicas:
        row = [*head, replica.endpoint, *([replica.node] if with_node else [])]
        if replica.pid:
            memory = f"{replica.resident_bytes / MEBIBYTE:.0f} MiB"
            row += [str(replica.pid), name_of(replica.device), memory, str(replica.queue_length)]
            row.append(", ".join(map(_bundle, replica.bundles)))
        else:
            row += [styled("silent", "red"), "", "", ""]
        rows.append(row)
        head = ["", ""]
    return rows or [head]


def _bundle(bundle: "ResidentBundle") -> str:
    """A bundle's version, and the original dtype if its weights were converted."""
    if bundle.dtype == bundle.bundle_dtype:
        return name_of(bundle.version)
    return f"{name_of(bundle.version)} ({name_of(bundle.bundle_dtype)} as {name_of(bundle.dtype)})"


def _fail(text: str, code: int) -> NoReturn:
    console_of(stderr=True).print(styled("error:", "red"), text, soft_wrap=True)
    raise typer.Exit(code)
