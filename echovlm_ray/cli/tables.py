"""Tables for any width: no word, quantity or address is broken if it fits on a line.

A table whose longest words do not fit side by side is printed as a list.
"""

import re
from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from echovlm_ray.cli.terminal import MAX_CELL, line

GAP = 2
# Units that are not broken: a quantity with its unit, such as "17.2 GB" or "50 %"; a Chinese, Japanese or Korean
# character; or a word.
_WIDE = r"\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef"
_PIECE = re.compile(rf"(?<!\S)\d[\d.,]* (?:GB|MB|kB|B|MiB|GiB|%|s|min|h|d)(?!\w)[^\s{_WIDE}]*|[{_WIDE}]|[^\s{_WIDE}]+")

Cell = str | Text | ProgressBar
Drawn = Text | ProgressBar


class Listing:
    """Rows under headers. Strings are literal, without markup, on one line each, and long ones are cut."""

    def __init__(self, *headers: str, title: str = "", right: Iterable[str] = (), header: bool = True) -> None:
        """
        Args:
            headers: the columns' headers; "" for a column without one.
            title: a line above.
            right: the headers of right-aligned columns.
            header: whether to show the headers.
        """
        self._headers = [line(text, MAX_CELL) for text in headers]
        self._title = line(title, MAX_CELL)
        self._right = frozenset(right)
        self._show_header = header
        self._rows: list[list[Drawn]] = []

    def add_row(self, *cells: Cell) -> None:
        """Adds a row; missing cells at its end are empty."""
        missing = len(self._headers) - len(cells)
        self._rows.append([_drawn(cell) for cell in (*cells, *[""] * missing)])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Renders the table if it fits, otherwise the list."""
        if self._title:
            yield Text(self._title, style="italic")
        # An empty column, like the progress if nothing loads.
        shown = [number for number in range(len(self._headers)) if self._natural(number)]
        widths = self._widths(shown, options.max_width)
        if widths is None:
            yield from self._as_list(options.max_width)
        else:
            yield self._as_table(shown, widths)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Takes the available width."""
        return Measurement(1, options.max_width)

    def _cells(self, number: int) -> list[Drawn]:
        header = [Text(self._headers[number])] if self._show_header else []
        return [*header, *(row[number] for row in self._rows)]

    def _natural(self, number: int) -> int:
        return max(map(_length, self._cells(number)), default=0)

    def _widths(self, shown: Sequence[int], width: int) -> list[int] | None:
        """The columns' widths; None if their longest words do not fit."""
        smallest = [max(map(_longest_word, self._cells(number))) for number in shown]
        room = width - GAP * (len(shown) - 1) - sum(smallest)
        return None if room < 0 else _shared_out(smallest, [self._natural(number) for number in shown], room)

    def _as_table(self, shown: Sequence[int], widths: Sequence[int]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_header=self._show_header)
        for number, width in zip(shown, widths, strict=True):
            header = self._headers[number]
            justify: JustifyMethod = "right" if header in self._right else "left"
            table.add_column(Text(header), width=width, overflow="fold", justify=justify)
        for row in self._rows:
            table.add_row(*(_wrapped(row[number], width) for number, width in zip(shown, widths, strict=True)))
        return table

    def _as_list(self, width: int) -> Iterable[Text | Table]:
        for row in self._rows:
            first, *rest = row
            if _length(first):
                label = f"{self._headers[0]} " if self._show_header and self._headers[0] else ""
                yield Text.assemble((label, "bold"), first) if isinstance(first, Text) else Text("")
            headers = self._headers[1:] if self._show_header else [""] * len(rest)
            yield from _entries([pair for pair in zip(headers, rest, strict=True) if _length(pair[1])], width)


def _entries(entries: Sequence[tuple[str, Drawn]], width: int) -> Iterable[Text | Table]:
    """Cells with their headers, as many on a line as fit."""
    together = Text()
    for header, cell in entries:
        label = f"{header}: " if header else ""
        needed = GAP + len(label) + _length(cell)
        if together and together.cell_len + needed > width:
            yield together
            together = Text()
        if isinstance(cell, Text) and needed <= width:
            together.append(" " * GAP + label).append_text(cell)
            continue
        if together:
            yield together
            together = Text()
        yield from _entry(header, cell, width)
    if together:
        yield together


def _entry(header: str, cell: Drawn, width: int) -> Iterable[Text | Table]:
    """A cell that does not fit on a line with its header, or is not text."""
    label = f"  {header}:" if header else " "
    if not isinstance(cell, Text):
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_row(label, cell)
        yield grid
        return
    room = width - Text(label).cell_len - 1
    if _longest_word(cell) <= room:
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(width=Text(label).cell_len)
        grid.add_column(width=room, overflow="fold")
        grid.add_row(Text(label), _wrapped(cell, room))
        yield grid
        return
    # On a separate line, so that an address is not broken.
    yield Text(label)
    yield cell


def _drawn(cell: Cell) -> Drawn:
    return Text(line(cell, MAX_CELL)) if isinstance(cell, str) else cell


def _length(cell: Drawn) -> int:
    if isinstance(cell, Text):
        return max((part.cell_len for part in cell.split(allow_blank=True)), default=0)
    return cell.width or 0


def _longest_word(cell: Drawn) -> int:
    if isinstance(cell, Text):
        return max((Text(piece).cell_len for piece in _PIECE.findall(cell.plain)), default=0)
    return cell.width or 0


def _wrapped(cell: Drawn, width: int) -> Drawn:
    """The wrapped cell; the library would separate a quantity from its unit."""
    if not isinstance(cell, Text) or cell.cell_len <= width:
        return cell
    # The range of pieces of each line.
    lines: list[tuple[int, int]] = []
    for piece in _PIECE.finditer(cell.plain):
        begin, end = piece.span()
        if lines and Text(cell.plain[lines[-1][0] : end]).cell_len <= width:
            lines[-1] = (lines[-1][0], end)
        else:
            lines.append((begin, end))
    return Text("\n").join(cell[begin:end] for begin, end in lines)


def _shared_out(smallest: Sequence[int], natural: Sequence[int], room: int) -> list[int]:
    """Distributes the width between the smallest and the natural widths, smallest needs first."""
    widths = list(smallest)
    order = sorted(range(len(widths)), key=lambda number: natural[number] - smallest[number])
    for position, number in enumerate(order):
        share = min(natural[number] - smallest[number], room // (len(order) - position))
        widths[number] += share
        room -= share
    return widths
