"""What the benchmarks that take long show of themselves: how far they are, and what they found."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def progress_of_parts(console: Console) -> Progress:
    """A bar for a measurement of so many parts, which says what it is at and is gone in the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def show_result(text: str, values: Mapping[str, Any], console: Console, *, as_json: bool) -> None:
    """Prints the text for people, or the values as JSON on the standard output."""
    if as_json:
        json.dump(values, sys.stdout, indent=2)
        print()
    else:
        console.print(text, markup=False, soft_wrap=True)
