"""What text of others may show: characters that draw themselves and nothing else; the rest as its escape.

Letters and marks that draw nothing come on top of Unicode's control and format characters. Two names that differ in one
of them look the same: manifests may not hold them, and terminals and pages show their escapes.
"""

import unicodedata

INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")


def is_safe(letter: str) -> bool:
    """Whether a character draws itself and nothing else; spaces of all widths do, line ends and tabs do not."""
    return (letter.isprintable() or unicodedata.category(letter) == "Zs") and letter not in INVISIBLE


def visible(text: str) -> str:
    """The text with everything that could steer a terminal or a page as its escape; line ends and tabs stay."""
    if text.isprintable() and INVISIBLE.isdisjoint(text):
        return text
    return "".join(
        letter if is_safe(letter) or letter in "\n\t" else _escaped(letter) for letter in text.replace("\r\n", "\n")
    )


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode() if ord(letter) < 0xD800 or ord(letter) > 0xDFFF else "\\ufffd"
