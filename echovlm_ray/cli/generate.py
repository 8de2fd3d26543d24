"""`echoray generate` and `echoray info`: a gateway's answers on the terminal. Only the client, nothing heavy."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from echovlm_ray.cli.credentials import Authority, Certificate, Key, TokenFile, tls_of, token_of
from echovlm_ray.cli.interruptible import interruptible
from echovlm_ray.cli.printable import printable
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
from echovlm_ray.client.request import GenerateOptions, Image, Language, Task

EXIT_FAILED = 1
EXIT_INVALID = 2
EXIT_UNAVAILABLE = 3
EXIT_DEADLINE = 4
EXIT_CREDENTIALS = 5
EXIT_INTERRUPTED = 130

Server = Annotated[str, typer.Option(help="host:port of the gateway.", envvar="ECHORAY_SERVER")]
Timeout = Annotated[float, typer.Option(min=0.001, help="Give up after this many seconds.")]
Name = Annotated[
    str | None, typer.Option(help="The system of this name that you run on this machine, instead of --server.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def generate(
    files: Annotated[
        list[str] | None,
        typer.Argument(help="DICOM files, stills (PNG, JPEG, TIFF …) or videos (MP4, AVI …); - reads one from stdin."),
    ] = None,
    task: Annotated[Task, typer.Option(help="What to write; vqa and free need --prompt.")] = "report",
    language: Annotated[Language, typer.Option(help="Language of the answer.")] = "en",
    prompt: Annotated[str, typer.Option(help="The question, or what else the model should know.")] = "",
    organ: Annotated[list[str] | None, typer.Option(help="An organ shown, if known; may be repeated.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The longest answer; else the server's default.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token always.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Keep the likeliest tokens up to this probability.")
    ] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.0, help="Above 1: repeat less.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    session: Annotated[
        str, typer.Option(help="Requests of one session get the same experts while a version is tried on some of them.")
    ] = "",
    server: Server = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    ca: Authority = None,
    certificate: Certificate = None,
    key: Key = None,
    timeout: Timeout = 300.0,
    as_json: AsJson = False,
    name: Name = None,
) -> None:
    """Writes about ultrasound images: the answer on stdout as it comes, where it comes from on stderr.

    Not a medical device: nothing it writes is a diagnosis.

    Exit status: 0 done; 1 server; 2 request; 3 no answer, or too busy; 4 time; 5 credentials; 130 Ctrl-C.
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
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "stop": stop or [],
        "session_key": session,
    }
    console = Console(stderr=True, highlight=False)
    server = _gateway_of(name, server, console)
    with _failures(console, server), _client(server, token_file, ca, certificate, key, timeout) as client:
        images = _read_stdin(files or [])
        if not images and not prompt.strip():
            raise ValueError("there is nothing to write about: name an image file, or give --prompt")
        with client.stream(images, **options) as stream, interruptible(stream) as events:
            if as_json:
                _print_json(stream, events)
            else:
                _print_stream(stream, events, console, len(images))


def _gateway_of(name: str | None, server: str, console: Console) -> str:
    """The address, or that of the system of a name."""
    with _failures(console, server):
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
    """Shows what a gateway serves: the model, its organs with the versions of their experts, its limits."""
    console = Console(stderr=True, highlight=False)
    server = _gateway_of(name, server, console)
    with _failures(console, server), _client(server, token_file, ca, certificate, key, timeout) as client:
        found = client.model_info()
        if as_json:
            print(json.dumps(dataclasses.asdict(found), ensure_ascii=False, indent=2))  # noqa: T201 - the command's output
        else:
            _print_info(found, Console(highlight=False))


def _client(
    server: str, token_file: Path | None, ca: Path | None, certificate: Path | None, key: Path | None, timeout: float
) -> EchoVLMClient:
    # Whoever waits at a terminal wants to hear at once that there is no server.
    return EchoVLMClient(
        server, token=token_of(token_file), tls=tls_of(ca, certificate, key), timeout_s=timeout, retry=False
    )


def _read_stdin(files: Sequence[str]) -> list[Image]:
    if files.count("-") > 1:
        raise ValueError("'-' stands for stdin, which can be read only once: name each further file by its path")
    return [sys.stdin.buffer.read() if name == "-" else name for name in files]


def _print_stream(stream: AnswerStream, events: Iterator[Event], console: Console, num_images: int) -> None:
    # Random or hostile text must not steer the terminal; a pipe gets exactly what the model wrote.
    readable = printable if sys.stdout.isatty() else str
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
    for line in _closing_lines(stream.summary, time.monotonic() - started):
        console.print(escape(line), style="dim", soft_wrap=True)


def _update(status: Status | None, text: str) -> None:
    if status is not None:
        status.update(escape(text))


def _accepted(event: Accepted) -> str:
    frames = sum(event.frames)
    seen = f", {event.visual_tokens} of them from {frames} frame{'s' * (frames != 1)}" if frames else ""
    return f"prompt of {event.prompt_tokens} tokens{seen}"


def _closing_lines(summary: Summary, seconds: float) -> list[str]:
    organs = ", ".join(
        f"{organ.organ} {organ.bundle_version} ({organ.routed_share:.0%})" for organ in summary.provenance.organs
    )
    rate = summary.completion_tokens / seconds if seconds > 0 else 0.0
    reason = {"stop": "complete", "length": "cut off at the limit of new tokens"}.get(
        summary.finish_reason, summary.finish_reason
    )
    line = (
        f"experts: {organs} · set {summary.provenance.expert_set_id[:12]} · {summary.completion_tokens} tokens, "
        f"{rate:.1f} tokens/s · {reason} · request {summary.request_id}"
    )
    return [line, *(f"note: {notice}" for notice in summary.notices)]


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
    print(json.dumps(answer, ensure_ascii=False))  # noqa: T201 - the command's output


def _print_info(found: ModelInfo, console: Console) -> None:
    console.print(f"{found.name} {found.version}", style="bold", markup=False)
    console.print(found.description, markup=False)
    console.print(f"backbone {found.backbone_digest[:12]} · expert set {found.expert_set_id[:12]}", markup=False)
    table = Table("organ", "version", "bundle", "experts")
    for organ in found.organs:
        name = f"{organ.organ} (default)" if organ.organ == found.default_organ else organ.organ
        table.add_row(escape(name), escape(organ.bundle_version), organ.bundle_digest[:12], str(organ.num_experts))
    console.print(table)
    limits = dataclasses.asdict(found.limits)
    console.print(
        "at most "
        + ", ".join(f"{value:,} {name.removeprefix('max_').replace('_', ' ')}" for name, value in limits.items())
    )


@contextmanager
def _failures(console: Console, server: str) -> Iterator[None]:
    """One line and one exit code for each way to fail; the request is cancelled by the stream's own block."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("cancelled", style="yellow")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except EchoVLMError as error:
        text, code = _explain(error, server)
        console.print(f"[red]error:[/red] {escape(text)}", soft_wrap=True)
        raise typer.Exit(code) from None
    except BrokenPipeError:
        # Whoever read has seen enough, as `head` does. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_FAILED) from None
    except (ValueError, OSError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
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
        case _:
            return f"{error} (request {error.request_id})", EXIT_FAILED
