"""How long requests wait for a part without a running replica."""

import time
from collections.abc import Callable


class Absence:
    """Counts from the moment at which a part was first missed, over all requests.

    A killed replica has a successor after some seconds, for which a request may wait. Where none comes, because for
    example the weights that it loads are gone, only those that came first wait; the others end at once.
    """

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Takes how long a missing part is waited for, in seconds."""
        self._patience_s = timeout_s
        self._clock = clock
        self._since = 0.0
        self._seen: float | None = None

    def ends(self) -> float:
        """Records that no replica runs; until when to wait for one, by the clock."""
        now = self._clock()
        # Unseen for as long, it may have been back meanwhile.
        if self._seen is None or now - self._seen > self._patience_s:
            self._since = now
        self._seen = now
        return self._since + self._patience_s

    def is_over(self) -> None:
        """Records that a replica runs."""
        self._seen = None
