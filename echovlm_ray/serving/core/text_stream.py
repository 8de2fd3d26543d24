"""Incremental detokenization: whole characters only, without stop strings."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Decodes incrementally. The concatenated pieces equal the text of decoding all tokens at once."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """`decode` returns the text of tokens, with U+FFFD for invalid characters."""
        self._decode = decode
        # Tokens since the last complete character, and the length of their text that was returned already.
        self._pending: list[int] = []
        self._emitted = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Returns further text. An incomplete character at the end, which decodes to U+FFFD, is held back."""
        self._pending.extend(token_ids)
        text = self._decode(self._pending)
        if not text.endswith(REPLACEMENT):
            piece = text[self._emitted :]
            self._pending.clear()
            self._emitted = 0
            return piece
        piece = text[self._emitted : -1]
        self._emitted = len(text) - 1
        return piece

    def finish(self) -> str:
        """Returns the text that was held back; an incomplete character becomes U+FFFD."""
        piece = self._decode(self._pending)[self._emitted :]
        self._pending.clear()
        self._emitted = 0
        return piece


class StopStrings:
    """Ends a text before the first stop string: the one that begins first, not the one that is complete first.

    The result does not depend on how the text is split into pieces. With "abc" and "b", "abc" ends the text "xabc" at
    "x", and "b" ends "xabd" at "xa": while "abc" is possible, the text from its "a" on is held back. If two begin at
    the same position, the text ends there for both.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """`stop` must not contain an empty string; it may be empty."""
        assert all(stop), "an empty stop string"
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Returns further text that belongs to the answer. Sets `stopped` when a stop string was found."""
        if self.stopped:
            return ""
        text = self._held + text
        found = self._first(text)
        begun = len(text) - max((_overlap(text, string) for string in self._stop), default=0)
        if found is not None and found <= begun:
            self.stopped = True
            self._held = ""
            return text[:found]
        self._held = text[begun:]
        return text[:begun]

    def finish(self) -> str:
        """Returns the text that was held back for a possible stop string. Sets `stopped` if it contains another one."""
        held, self._held = self._held, ""
        found = self._first(held)
        if found is None:
            return held
        self.stopped = True
        return held[:found]

    def _first(self, text: str) -> int | None:
        """The position of the first complete stop string."""
        return min((place for string in self._stop if (place := text.find(string)) >= 0), default=None)


def _overlap(text: str, string: str) -> int:
    """The length of the longest suffix of the text that is a prefix of the string."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
