"""When a router takes a question of an evaluation: at any time where there are no callers, seldom where there are."""

import time
from collections.abc import Callable

from echovlm_ray.errors import OverloadedError

NO_ROOM = "requests of callers need the room: an evaluation asks again later"


class EvaluationTurns:
    """Belongs to one event loop. A prompt, and the encoding of its picture, hold up the tokens of all other requests:
    that is rare enough not to be seen in the 99th percentile of the time between tokens."""

    def __init__(self, interval_s: float, callers: Callable[[], int]) -> None:
        """Takes its parts.

        Args:
            interval_s: between two questions while callers are served, and since the last caller came.
            callers: how many of their requests wait or run.
        """
        self._interval_s = interval_s
        self._callers = callers
        self._last_caller = self._last_question = float("-inf")

    def caller_came(self) -> None:
        """A caller's request begins."""
        self._last_caller = time.monotonic()

    def take(self) -> None:
        """Begins a question. To be called before anything is computed for it.

        Raises:
            OverloadedError: it is too early; says when to come back.
        """
        now = time.monotonic()
        wait_s = self._last_question + self._interval_s - now
        busy = self._callers() > 0 or now < self._last_caller + self._interval_s
        if busy and wait_s > 0:
            raise OverloadedError(NO_ROOM, retry_after_s=wait_s)
        self._last_question = now
