"""Incremental detokenization: whole characters only, without stop strings."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Decodes step by step; all pieces together are the text that decoding at once gives."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """`decode` gives the text of tokens, U+FFFD for what is no character."""
        self._decode = decode
        # Tokens since the last place between two characters, and how much of their text is out already.
        self._pending: list[int] = []
        self._emitted = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Further text. Of an unfinished character at the end, which decodes to one U+FFFD, nothing comes yet."""
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
        """What was held back: an unfinished character stays U+FFFD."""
        piece = self._decode(self._pending)[self._emitted :]
        self._pending.clear()
        self._emitted = 0
        return piece


class StopStrings:
    """Ends a text before the first of some strings: the one that begins first, not the one that is complete first.

    The result does not depend on how the text is cut into pieces. Of "abc" and "b", "abc" ends the text "xabc" at "x",
    and "b" ends "xabd" at "xa": while "abc" may still come, nothing from its "a" on is given out. Where two begin at
    one place, the text ends at that place whichever of them it is.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """`stop` holds no empty string; it may be empty itself."""
        assert all(stop), "an empty stop string"
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Further text that certainly belongs to the answer. Sets `stopped` when it is certain where it ends."""
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
        """What was held back because a stop string might have begun. Sets `stopped` when another one is in it."""
        held, self._held = self._held, ""
        found = self._first(held)
        if found is None:
            return held
        self.stopped = True
        return held[:found]

    def _first(self, text: str) -> int | None:
        """Where the first stop string begins that is complete."""
        return min((place for string in self._stop if (place := text.find(string)) >= 0), default=None)


def _overlap(text: str, string: str) -> int:
    """How long an end of the text is that begins the string."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
