"""An answer's tokens to text while they come: whole characters only, and nothing of a stop string."""

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
    """Ends a text before the first of some strings."""

    def __init__(self, stop: Sequence[str]) -> None:
        """`stop` holds no empty string; it may be empty itself."""
        assert all(stop), "an empty stop string"
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Further text that certainly belongs to the answer. Sets `stopped` when a string occurred."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [position for string in self._stop if (position := text.find(string)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max((_overlap(text, string) for string in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back because a stop string might have begun."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """How long an end of the text is that begins the string."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
