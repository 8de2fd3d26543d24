"""The text allowed in a manifest. It is shown in terminals, tables, logs and pages, which it must not steer.

Refused are control characters (C0, C1 and DEL, so every escape sequence), characters of format (Unicode's category Cf:
changes of direction, zero-width ones, the byte order mark), separators of lines and paragraphs, halves of surrogate
pairs, and letters that draw nothing: with the first a name moves the cursor, with the last two different names look the
same.
"""

import unicodedata
from typing import Annotated

from pydantic import AfterValidator

from experts.bundles.invisible import INVISIBLE

_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def check_line(text: str) -> str:
    """The text itself, if it is one line that shows all that it holds.

    Raises:
        ValueError: it has another character; the text names the first one and its place.
    """
    return _check(text, allowed="")


def check_prose(text: str) -> str:
    """The text itself, if it shows all that it holds; it may have several lines, and tabs.

    Raises:
        ValueError: it has another character; the text names the first one and its place.
    """
    return _check(text, allowed="\n\t")


def quoted(text: str, limit: int = 200) -> str:
    """A part of a foreign text for an error, with everything that could steer a terminal as its escape."""
    return repr(text[:limit])[1:-1]


def _check(text: str, allowed: str) -> str:
    for place, letter in enumerate(text):
        if letter not in allowed and (unicodedata.category(letter) in _CATEGORIES or letter in INVISIBLE):
            name = unicodedata.name(letter, "control character")
            raise ValueError(
                f"has the character U+{ord(letter):04X} ({name}) at place {place + 1}, which is not shown and could "
                "steer a terminal; leave it out"
            )
    return text


Line = Annotated[str, AfterValidator(check_line)]
Prose = Annotated[str, AfterValidator(check_prose)]
