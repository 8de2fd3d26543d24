"""The characters allowed in a manifest, whose text is shown in terminals, tables, logs and pages.

Control characters (C0, C1 and DEL, so every escape sequence), format characters (Unicode's category Cf: changes of
direction, zero-width characters, the byte order mark), line and paragraph separators, surrogates, and invisible letters
are refused. Control characters could move the cursor, and with invisible letters two different names look the same.
"""

import unicodedata
from typing import Annotated

from pydantic import AfterValidator

from experts.bundles.invisible import INVISIBLE

_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def check_line(text: str) -> str:
    """Returns the text if it is one line without refused characters.

    Raises:
        ValueError: it has a refused character; the text names the first one and its position.
    """
    return _check(text, allowed="")


def check_prose(text: str) -> str:
    """Returns the text if it has no refused characters; newlines and tabs are allowed.

    Raises:
        ValueError: it has a refused character; the text names the first one and its position.
    """
    return _check(text, allowed="\n\t")


def quoted(text: str, limit: int = 200) -> str:
    """A part of a foreign text for an error, with refused characters as escapes."""
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
