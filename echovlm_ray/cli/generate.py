"""`echoray generate` and `echoray info`: a gateway's answers on the terminal. Needs only the client's packages."""

import dataclasses
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console
from rich.status import Status

from echovlm_ray.cli.credentials import Authority, Certificate, Key, TokenFile, tls_of, token_of
from echovlm_ray.cli.interruptible import interruptible
from echovlm_ray.cli.saved_request import check_place, saved_request, write_request
from echovlm_ray.cli.tables import Listing
from echovlm_ray.cli.terminal import console_of, line, name_of, say_json, styled
from echovlm_ray.cli.work import finite
from echovlm_ray.client import (
    Accepted,
    AnswerStream,
    DeadlineExceededError,
    EchoVLMClient,
    EchoVLMError,
    Event,
    InvalidRequestError,
    ModelInfo,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    Summary,
    Text,
    UnauthenticatedError,
    UnavailableError,
)
from echovlm_ray.client.connection import DEFAULT_ADDRESS
from echovlm_ray.client.request import GenerateOptions, Image, read_images
from echovlm_ray.tasks import TASKS, Language, TaskName
from experts.bundles.invisible import visible

EXIT_FAILED = 1
EXIT_INVALID = 2
EXIT_UNAVAILABLE = 3
EXIT_DEADLINE = 4
EXIT_CREDENTIALS = 5
EXIT_INTERRUPTED = 130
MAX_DESCRIPTION = 2000
ASK_PROMPT = " and ".join(task.name for task in TASKS.values() if task.needs_prompt)

Server = Annotated[str, typer.Option(help="host:port of the gateway.", envvar="ECHORAY_SERVER")]
Timeout = Annotated[float, typer.Option(min=0.001, callback=finite, help="Timeout in seconds.")]
Name = Annotated[
    str | None, typer.Option(help="The system of this name that you run on this machine, instead of --server.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def generate(
    files: Annotated[
        list[str] | None,
        typer.Argument(help="DICOM files, stills (PNG, JPEG, TIFF …) or videos (MP4, AVI …); - reads one from stdin."),
    ] = None,
    task: Annotated[TaskName, typer.Option(help=f"What to write; {ASK_PROMPT} need --prompt.")] = "report",
    language: Annotated[Language, typer.Option(help="Language of the answer.")] = "en",
    prompt: Annotated[str, typer.Option(help="The question, or further information for the model.")] = "",
    organ: Annotated[list[str] | None, typer.Option(help="An organ in the images, if known. Repeatable.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The most tokens of the answer. [default: the server's]")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, callback=finite, help="0 is greedy decoding.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    top_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, callback=finite, help="Keep the most likely tokens up to this probability."),
    ] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.0, callback=finite, help="Above 1 repeats less.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling reproducible.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text. Repeatable.")] = None,
    session: Annotated[
        str, typer.Option(help="Requests of one session get the same version of the experts during a canary.")
    ] = "",
    expert_set: Annotated[
        str, typer.Option(help="Use the expert set with this id, if it is loaded now; see `experts replay`.")
    ] = "",
    save_request: Annotated[
        Path | None, typer.Option(help="Save request and tokens for `experts replay` to this new file.")
    ] = None,
    server: Server = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    ca: Authority = None,
    certificate: Certificate = None,
    key: Key = None,
    timeout: Timeout = 300.0,
    as_json: AsJson = False,
    name: Name = None,
) -> None:
    """Writes about ultrasound images: streams the answer to stdout, and its provenance to stderr.

    Not a medical device: nothing it writes is a diagnosis.

    Exit status: 0 done; 1 server error; 2 invalid request; 3 no answer, or overloaded; 4 timeout; 5 credentials; 130
    Ctrl-C.
    """
    options: GenerateOptions = {
        "task": task,
        "language": language,
        "prompt": prompt,
        "organs": organ or [],
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        # Without a seed, the answer could not be reproduced.
        "seed": secrets.randbits(64) if save_request and temperature > 0 and seed is None else seed,
        "max_new_tokens": max_new_tokens,
        "stop": stop or [],
        "session_key": session,
        "expert_set_id": expert_set,
        "for_replay": save_request is not None,
    }
    console = console_of(stderr=True)
    server = _gateway_of(name, server, console)
    with failures(console, server), _client(console, server, token_file, ca, certificate, key, timeout) as client:
        images = _read_stdin(files or [])
        if not images and not prompt.strip():
            raise ValueError("there is nothing to write about: name an image file, or give --prompt")
        # Read once, so that the saved bytes are those that were sent.
        contents = images if save_request is None else _contents(images, save_request)
        with client.stream(contents, **options) as stream, interruptible(stream) as events:
            if as_json:
                _print_json(stream, events)
            else:
                _print_stream(stream, events, console, len(images))
        if save_request is not None and stream.summary is not None:
            record = saved_request(options, images, read_images(contents), stream.summary, save_request.parent)
            write_request(save_request, record)


def _contents(images: Sequence[Image], save_request: Path) -> list[Image]:
    check_place(save_request)
    return [*read_images(images)]


def _gateway_of(name: str | None, server: str, console: Console) -> str:
    """The given address, or that of the system with the given name."""
    with failures(console, server):
        if name is None:
            return server
        from echovlm_ray.cli.state import system_named

        return system_named(name).gateway


def info(
    server: Server = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    ca: Authority = None,
    certificate: Certificate = None,
    key: Key = None,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
    name: Name = None,
) -> None:
    """Shows a gateway's model, organs with the versions of their experts, and limits."""
    console = console_of(stderr=True)
    server = _gateway_of(name, server, console)
    with failures(console, server), _client(console, server, token_file, ca, certificate, key, timeout) as client:
        found = client.model_info()
        if as_json:
            say_json(dataclasses.asdict(found), indent=2)
        else:
            _print_info(found, console_of())


def _client(
    console: Console,
    server: str,
    token_file: Path | None,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    timeout: float,
) -> EchoVLMClient:
    reported: list[EchoVLMError] = []

    def waiting(error: EchoVLMError) -> None:
        # A retry waits for a restarting server; if there may be none, that is reported first.
        if not reported:
            reported.append(error)
            console.print(line(_explain(error, server)[0]), style="yellow", soft_wrap=True)
            console.print(f"Trying again for up to {timeout:g} s (--timeout); Ctrl-C ends it.", style="yellow")

    return EchoVLMClient(
        server, token=token_of(token_file), tls=tls_of(ca, certificate, key), timeout_s=timeout, waiting=waiting
    )


def _read_stdin(files: Sequence[str]) -> list[Image]:
    if files.count("-") > 1:
        raise ValueError("'-' stands for stdin, which can be read only once: name each further file by its path")
    return [sys.stdin.buffer.read() if name == "-" else name for name in files]


def _print_stream(stream: AnswerStream, events: Iterator[Event], console: Console, num_images: int) -> None:
    # On a terminal, control characters of the text are escaped; a pipe gets exactly the model's text.
    readable = visible if sys.stdout.isatty() else str
    started = time.monotonic()
    sending = f"sending {num_images} image{'s' * (num_images != 1)} …" if num_images else "sending …"
    with console.status(sending) if console.is_terminal else nullcontext() as status:
        for event in events:
            if isinstance(event, Accepted):
                started = time.monotonic()
                _update(status, f"{_accepted(event)}; waiting for the first words …")
            elif isinstance(event, Text):
                if status is not None:
                    status.stop()
                sys.stdout.write(readable(event.text))
                sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    assert stream.summary is not None
    for closing in _closing_lines(stream.summary, time.monotonic() - started):
        console.print(line(closing), style="dim", soft_wrap=True)


def _update(status: Status | None, text: str) -> None:
    if status is not None:
        status.update(styled(text, ""))


def _accepted(event: Accepted) -> str:
    frames = sum(event.frames)
    seen = f", {event.visual_tokens} of them from {frames} frame{'s' * (frames != 1)}" if frames else ""
    return f"prompt of {event.prompt_tokens} tokens{seen}"


def _closing_lines(summary: Summary, seconds: float) -> list[str]:
    organs = ", ".join(
        f"{name_of(organ.organ)} {name_of(organ.bundle_version)} ({organ.routed_share:.0%})"
        for organ in summary.provenance.organs
    )
    rate = summary.completion_tokens / seconds if seconds > 0 else 0.0
    reason = {"stop": "complete", "length": "cut off at the limit of new tokens"}.get(
        summary.finish_reason, summary.finish_reason
    )
    closing = (
        f"experts: {organs} · set {summary.provenance.expert_set_id[:12]} · {summary.completion_tokens} tokens, "
        f"{rate:.1f} tokens/s · {reason} · request {summary.request_id}"
    )
    return [closing, *(f"note: {notice}" for notice in summary.notices)]


def _print_json(stream: AnswerStream, events: Iterator[Event]) -> None:
    started = time.monotonic()
    text = "".join(event.text for event in events if isinstance(event, Text))
    assert stream.summary is not None
    answer: dict[str, Any] = {
        "text": text,
        **dataclasses.asdict(stream.summary),
        "accepted": dataclasses.asdict(stream.accepted) if stream.accepted is not None else None,
        "seconds": round(time.monotonic() - started, 3),
    }
    say_json(answer)


def _print_info(found: ModelInfo, console: Console) -> None:
    console.print(f"{name_of(found.name)} {name_of(found.version)}", style="bold")
    console.print(found.description[:MAX_DESCRIPTION])
    console.print(line(f"backbone {found.backbone_digest[:12]} · expert set {found.expert_set_id[:12]}"))
    table = Listing("organ", "version", "bundle", "experts", right=["experts"])
    for organ in found.organs:
        name = f"{name_of(organ.organ)} (default)" if organ.organ == found.default_organ else name_of(organ.organ)
        table.add_row(name, name_of(organ.bundle_version), organ.bundle_digest[:12], str(organ.num_experts))
    console.print(table)
    limits = dataclasses.asdict(found.limits)
    console.print(
        "at most "
        + ", ".join(f"{value:,} {name.removeprefix('max_').replace('_', ' ')}" for name, value in limits.items())
    )


@contextmanager
def failures(console: Console, server: str) -> Iterator[None]:
    """Converts errors to one line and an exit code. The stream's `with` block cancels the request."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("cancelled", style="yellow")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except EchoVLMError as error:
        text, code = _explain(error, server)
        console.print(styled("error:", "red"), text, soft_wrap=True)
        raise typer.Exit(code) from None
    except BrokenPipeError:
        # The reader has closed the pipe, like `head`. Python would report it again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_FAILED) from None
    except (ValueError, OSError) as error:
        console.print(styled("error:", "red"), str(error), soft_wrap=True)
        raise typer.Exit(EXIT_INVALID) from None


def _explain(error: EchoVLMError, server: str) -> tuple[str, int]:
    retry_after_s = getattr(error, "retry_after_s", None)
    later = "" if retry_after_s is None else f" Try again in {retry_after_s:g} s."
    match error:
        case InvalidRequestError(violations=[_, *_] as violations):
            return "; ".join(str(violation) for violation in violations), EXIT_INVALID
        case InvalidRequestError() | NotFoundError():
            return str(error), EXIT_INVALID
        case UnavailableError(reached=False):
            return (
                f"no EchoVLM server answers at {server}: start one with `make serve`, or name yours with --server "
                f"({error})",
                EXIT_UNAVAILABLE,
            )
        case UnavailableError() | OverloadedError():
            return f"{error}.{later}" if later else str(error), EXIT_UNAVAILABLE
        case DeadlineExceededError():
            return "the answer was not complete in time: give more with --timeout, or ask for less", EXIT_DEADLINE
        case UnauthenticatedError():
            return f"{error} (give the token's file with --token-file)", EXIT_CREDENTIALS
        case PermissionDeniedError():
            return str(error), EXIT_CREDENTIALS
        case EchoVLMError(code=grpc.StatusCode.UNIMPLEMENTED):
            return (
                f"what answers at {server} is not a gateway: name the gateway's address, not Control's, with --server",
                EXIT_UNAVAILABLE,
            )
        case _:
            return f"{error} (request {error.request_id})", EXIT_FAILED
