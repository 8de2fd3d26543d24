"""`echoray experts replay`: computes a past answer again with the same experts. Needs only the client's packages."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from echovlm_ray.cli.control import Control, control_failures
from echovlm_ray.cli.credentials import Authority, Certificate, Key, TokenFile, tls_of, token_of
from echovlm_ray.cli.generate import Server, failures
from echovlm_ray.cli.interruptible import interruptible
from echovlm_ray.cli.saved_request import SavedRequest, first_difference, read_request
from echovlm_ray.cli.terminal import console_of, line, name_of, say, say_json
from echovlm_ray.cli.work import fail, finite
from echovlm_ray.client import EchoVLMClient, Summary, Text
from echovlm_ray.client.connection import DEFAULT_ADDRESS
from echovlm_ray.client.control import DEFAULT_CONTROL, ExpertControlClient

EXIT_INVALID = 2
EXIT_DIFFERENT = 6


def replay(
    path: Annotated[Path, typer.Argument(metavar="REQUEST.json", help="A file of `generate --save-request`.")],
    server: Server = DEFAULT_ADDRESS,
    control: Control = DEFAULT_CONTROL,
    name: Annotated[
        str | None,
        typer.Option(help="The system of this name that you run on this machine, instead of both addresses."),
    ] = None,
    token_file: TokenFile = None,
    control_token_file: Annotated[
        Path | None, typer.Option(help="Control's token file, if it differs. [default: --token-file]")
    ] = None,
    ca: Authority = None,
    certificate: Certificate = None,
    key: Key = None,
    timeout: Annotated[
        float, typer.Option(min=0.001, callback=finite, help="Timeout of the answer in seconds.")
    ] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Computes a saved answer again with its expert set, and compares all tokens.

    If the set's bundles are not loaded any more, the system loads them from the registry in addition to the live ones,
    within the replicas' memory limit, and unloads them afterwards. Other requests are not affected.

    Exit status: 0 equal; 6 different; 1 server error; 2 invalid request, or the set cannot be loaded; 3 no answer, or
    not enough memory; 4 timeout; 5 credentials; 130 Ctrl-C.

    Example: `echoray experts replay answers/visit-1.json`
    """
    console = console_of(stderr=True)
    try:
        if name is not None:
            from echovlm_ray.cli.state import system_named

            system = system_named(name)
            server, control = system.gateway, system.control
        request, images = read_request(path)
        tls = tls_of(ca, certificate, key)
        operator = ExpertControlClient(control, token=token_of(control_token_file or token_file), tls=tls)
        client = EchoVLMClient(server, token=token_of(token_file), tls=tls, timeout_s=timeout)
    except (ValueError, OSError) as error:
        fail(line(str(error)), EXIT_INVALID)
    with operator, client:
        text, summary = _answer(operator, client, request, images, console, server)
    found = _found(request, text, summary)
    if as_json:
        say_json(found)
    else:
        say(_format_answer(request, summary, found["first_difference"]))
    if not found["equal"]:
        raise typer.Exit(EXIT_DIFFERENT)


def _answer(
    operator: ExpertControlClient,
    client: EchoVLMClient,
    request: SavedRequest,
    images: list[bytes],
    console: Console,
    server: str,
) -> tuple[str, Summary]:
    """Loads the set for the time of the answer."""
    answer = request.answer
    with control_failures(operator.address):
        held = operator.replay(
            answer.expert_set_id,
            organs=[organ.organ for organ in answer.organs],
            backbone_digest=answer.backbone_digest,
            versions={organ.digest: organ.version for organ in answer.organs},
        )
    with held:
        loading = console.status("waiting for the expert set to be loaded …")
        with control_failures(operator.address), interruptible(held) as states, loading:
            held.wait(states)
        with failures(console, server), client.stream(images, **request.options()) as stream:
            with interruptible(stream) as events, console.status("computing the answer again …"):
                text = "".join(event.text for event in events if isinstance(event, Text))
            assert stream.summary is not None
            return text, stream.summary


def _found(request: SavedRequest, text: str, summary: Summary) -> dict[str, Any]:
    expected, found = request.answer.token_ids, summary.token_ids
    place = first_difference(expected, found)
    return {
        "equal": place is None,
        "first_difference": place,
        "expected_token": expected[place] if place is not None and place < len(expected) else None,
        "found_token": found[place] if place is not None and place < len(found) else None,
        "expected_tokens": len(expected),
        "found_tokens": len(found),
        "expert_set_id": summary.provenance.expert_set_id,
        "organs": {organ.organ: organ.bundle_version for organ in summary.provenance.organs},
        "request_id": summary.request_id,
        "text": text,
    }


def _format_answer(request: SavedRequest, summary: Summary, place: int | None) -> str:
    organs = ", ".join(f"{name_of(organ.organ)} {name_of(organ.bundle_version)}" for organ in summary.provenance.organs)
    by = f"expert set {summary.provenance.expert_set_id[:12]}, {organs}"
    if place is None:
        return f"equal: all {len(summary.token_ids)} tokens ({by})"
    expected, found = request.answer.token_ids, summary.token_ids
    before = f"token {expected[place]}" if place < len(expected) else "the end"
    now = f"token {found[place]}" if place < len(found) else "the end"
    return f"different: place {place + 1} of {len(expected)} had {before} and has {now} now ({by})"
