"""Attributes as numbers and words, or None where they are missing, empty or cannot be read.

pydicom converts a value on access and may raise then, with a text that may quote the value (P12).
"""

import math
from collections.abc import Iterable, Sequence

from pydicom import Dataset


def numbers(dataset: Dataset, keyword: str) -> tuple[float, ...]:
    """All finite values of a numeric attribute."""
    try:
        value = dataset.get(keyword, None)
        values = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else (value,)
        found = tuple(float(item) for item in values)
    except Exception:
        # Any exception: what a parser raises on hostile bytes is not to be foreseen.
        return ()
    return found if all(map(math.isfinite, found)) else ()


def number(dataset: Dataset, keyword: str) -> float | None:
    """The first value of a numeric attribute."""
    found = numbers(dataset, keyword)
    return found[0] if found else None


def integer(dataset: Dataset, keyword: str) -> int | None:
    """The first value of an attribute that counts something."""
    found = number(dataset, keyword)
    return None if found is None or found != int(found) else int(found)


def word(dataset: Dataset, keyword: str) -> str:
    """The first value of a coded string, upper case; empty where there is none."""
    try:
        value = dataset.get(keyword, None)
        first = value[0] if isinstance(value, Sequence) and not isinstance(value, str | bytes) and value else value
        return "" if first is None else str(first).strip("\0 ").upper()
    except Exception:
        return ""


def items(dataset: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence, none where it cannot be read."""
    try:
        value = dataset.get(keyword, None)
        return list(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes) else []
    except Exception:
        return []


def has(dataset: Dataset, keyword: str) -> bool:
    """Whether the attribute is present, with any value."""
    return keyword in dataset
