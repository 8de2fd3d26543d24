"""What the benchmarks that take long show of themselves: how far they are, and what they found."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def progress_of_parts(console: Console) -> Progress:
    """A bar for a measurement of so many parts, which says what it is at and is gone in the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


RESULTS = Path(__file__).resolve().parent / "results"


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--output`; see `keep_result`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results (default: %(default)s)")


def keep_result(
    name: str, text: str, values: Mapping[str, Any], options: argparse.Namespace, console: Console, picture: str = ""
) -> Path:
    """Prints a result, and writes it as `<name>.md` and `<name>.json` into the folder of `--output`.

    Args:
        name: of the files.
        text: for people, Markdown.
        values: the numbers.
        options: of `add_result_options`.
        console: where the text goes.
        picture: what `<name>.png` shows, where there is one; the text shows it.

    Returns:
        The path of the picture.
    """
    show_result(text, values, console, as_json=options.json)
    options.output.mkdir(parents=True, exist_ok=True)
    shown = f"{text}\n![{picture}]({name}.png)\n" if picture else text
    (options.output / f"{name}.md").write_text(shown, encoding="utf-8")
    (options.output / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return Path(options.output / f"{name}.png")


def show_result(text: str, values: Mapping[str, Any], console: Console, *, as_json: bool) -> None:
    """Prints the text for people, or the values as JSON on the standard output."""
    if as_json:
        json.dump(values, sys.stdout, indent=2)
        print()
    else:
        console.print(text, markup=False, soft_wrap=True)
