"""The output of all commands: escapes control characters of foreign text.

Names, reasons, file names, answers and errors come from manifests, registries, servers and models. Characters that
would move the cursor, colour, hide or reorder text are shown as escapes, for example \\x1b, and rich's markup is
literal.
"""

import json
import os
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from experts.bundles.invisible import is_safe, visible

# A pipe has no width, and reasons must not be cut off.
PIPE_WIDTH = 200
# The longest name; longer ones are cut, because they could fill the screen.
MAX_NAME = 60
# The longest reason in the history has 500.
MAX_CELL = 600
# A path has at most 4096; longer ones are cut.
MAX_LINE = 1000


def line(text: str, limit: int = MAX_LINE) -> str:
    """The text on one line, cut to this many characters, the last of them `…`."""
    shown = visible(" ".join(text.split()))
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def name_of(text: str) -> str:
    """A name, cut if it is too long."""
    return line(text, MAX_NAME)


def styled(text: str, style: str) -> Text:
    """A text in a style, escaped."""
    return Text(visible(text), style=style)


class TerminalConsole(Console):
    """A console for literal strings: no markup, no emoji codes, no control characters."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        """Writes to stdout, or to stderr with `stderr`."""
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Converts a string to text without markup; rich calls it for every string."""
        return super().render_str(visible(text), **{**options, "markup": False, "emoji": False, "highlight": False})


def console_of(*, stderr: bool = False) -> TerminalConsole:
    """The console for tables and messages, with the width of the terminal or of COLUMNS; a pipe without it is wide."""
    console = TerminalConsole(stderr=stderr)
    if console.is_terminal or os.environ.get("COLUMNS", "").isdecimal():
        return console
    return TerminalConsole(stderr=stderr, width=PIPE_WIDTH)


def say(text: str, *, err: bool = False) -> None:
    """Prints lines without wrapping."""
    typer.echo(visible(text), err=err)


def say_json(value: Any, *, indent: int | None = None) -> None:
    """Prints a value or JSON text with escapes for control characters, so that it reads back unchanged."""
    text = value if isinstance(value, str) else json.dumps(value, indent=indent, ensure_ascii=False)
    typer.echo("".join(letter if is_safe(letter) or letter in "\n\t" else _json_escape(letter) for letter in text))


def _json_escape(letter: str) -> str:
    # Characters above the basic plane as surrogate pairs, as in JSON.
    return json.dumps(letter)[1:-1]
