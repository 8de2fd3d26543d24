"""The table of a result: measures, their values, and what they should be."""

from collections.abc import Iterable


def measure_table(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """Lines of Markdown.

    Args:
        rows: measure, value and target; "" where there is no target.
    """
    return ["| measure | value | target |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
