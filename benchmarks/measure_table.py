"""Tables of Markdown; the commonest has measures, their values, and what they should be."""

from collections.abc import Iterable


def table_head(names: str) -> list[str]:
    """The first two lines of a table, whose columns are called `"| one | other |"`."""
    return [names, "|" + " --- |" * (names.count("|") - 1)]


def measure_table(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """Lines of Markdown.

    Args:
        rows: measure, value and target; "" where there is no target.
    """
    return [*table_head("| measure | value | target |"), *(f"| {' | '.join(row)} |" for row in rows)]
