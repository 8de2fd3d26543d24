"""All output of the commands goes through this module, which escapes control characters of foreign text.

Names, reasons, file names, answers and errors come from manifests, registries, servers and models. Whatever would move
the cursor, colour, hide or reorder text is shown as its escape, for example \\x1b, and rich's markup as it is.
"""

import json
import os
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from experts.bundles.invisible import is_safe, visible

# A pipe has no width to fit into, and a reason that is cut off is of no use.
PIPE_WIDTH = 200
# A name identifies; one that is longer is meant to fill the screen.
MAX_NAME = 60
# A reason in the history has at most 500.
MAX_CELL = 600
# A path has at most 4096; what is longer than people read ends in an ellipsis.
MAX_LINE = 1000


def line(text: str, limit: int = MAX_LINE) -> str:
    """The text on one line, cut to so many characters, the last of them `…`."""
    shown = visible(" ".join(text.split()))
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def name_of(text: str) -> str:
    """A name, which is cut where it is longer than names are."""
    return line(text, MAX_NAME)


def styled(text: str, style: str) -> Text:
    """A text of ours or of others in a style."""
    return Text(visible(text), style=style)


class TerminalConsole(Console):
    """A console that takes every string as it is: no markup, no emoji codes, and nothing that steers the terminal."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        """Writes to stdout or stderr."""
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Makes a string into what is drawn; rich calls it for every string that it is given."""
        return super().render_str(visible(text), **{**options, "markup": False, "emoji": False, "highlight": False})


def console_of(*, stderr: bool = False) -> TerminalConsole:
    """Where tables and sentences go: as wide as the terminal, or as COLUMNS says; a pipe without it is wide."""
    console = TerminalConsole(stderr=stderr)
    if console.is_terminal or os.environ.get("COLUMNS", "").isdecimal():
        return console
    return TerminalConsole(stderr=stderr, width=PIPE_WIDTH)


def say(text: str, *, err: bool = False) -> None:
    """Prints lines as they are, however wide the terminal is."""
    typer.echo(visible(text), err=err)


def say_json(value: Any, *, indent: int | None = None) -> None:
    """Prints a value, or JSON that is text already, so that it reads back as it was and steers no terminal."""
    text = value if isinstance(value, str) else json.dumps(value, indent=indent, ensure_ascii=False)
    typer.echo("".join(letter if is_safe(letter) or letter in "\n\t" else _json_escape(letter) for letter in text))


def _json_escape(letter: str) -> str:
    # Of characters above the basic plane as two halves, which is how JSON writes them.
    return json.dumps(letter)[1:-1]
