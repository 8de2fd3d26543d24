"""Shared by the commands on checkpoints and bundles: clear errors, sizes, a progress bar in bytes."""

import math
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from echovlm_ray.cli.terminal import console_of, say

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str, option: str) -> int:
    """Bytes of a size like 5GB or 500MB; ends the command where it is none, naming the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match.group(2).upper() not in _UNITS:
        fail(f"{option} {text!r} is no size; write one like 5GB or 500MB", code=2)
    size = int(float(match.group(1)) * _UNITS[match.group(2).upper()])
    if size < 1:
        fail(f"{option} must be at least one byte", code=2)
    return size


def finite(value: float | None) -> float | None:
    """A number of an option, which must be one; for typer's `callback`.

    Raises:
        typer.BadParameter: it is infinite, or not a number.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number that can be counted with; give one like 30")
    return value


def fail(message: str, code: int = 1) -> NoReturn:
    """Ends the command with one line on stderr."""
    say(f"error: {message}", err=True)
    raise typer.Exit(code)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Reports user errors and disk errors in one line; SIGTERM cleans up like Ctrl-C."""

    from echovlm_ray.checkpoint.layout import InvalidCheckpointError
    from experts.errors import ExpertCapacityError, InvalidBundleError, RegistryError, UnknownBundleError

    def interrupt(signum: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except (
        InvalidCheckpointError,
        InvalidBundleError,
        UnknownBundleError,
        RegistryError,
        ExpertCapacityError,
    ) as error:
        fail(" ".join(str(error).split()))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        fail("interrupted; nothing was left behind", code=130)
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def byte_progress(what: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar on stderr: yields a function for the total and one for each step, both in bytes."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = console_of(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield (
            lambda total: bar.update(task, total=total),
            lambda nbytes: bar.advance(task, nbytes),
        )
