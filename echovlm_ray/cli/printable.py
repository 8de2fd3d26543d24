"""Text of others on a terminal: what could steer it is replaced."""


def printable(text: str) -> str:
    """The text with control characters as U+FFFD; line ends and tabs stay."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
