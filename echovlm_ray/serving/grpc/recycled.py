"""Places for calls that need no credentials: the newest gets one at once, and the oldest loses its own."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class RecycledPlaces:
    """A number of places. When all are taken, a newcomer gets that of the sender with the most, its oldest.

    So a sender that holds places and does nothing keeps no other one waiting, and none of its own address either.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        # Sender, and what ends its use of the place; in the order in which they came.
        self._held: dict[object, tuple[bytes, Callable[[], None]]] = {}

    @contextmanager
    def place(self, sender: bytes, end: Callable[[], None]) -> Iterator[None]:
        """Holds a place for the block.

        Args:
            sender: takes it.
            end: called when a newcomer gets the place; the block should then be left.
        """
        if len(self._held) >= self._places:
            self._take_back(sender)
        key = object()
        self._held[key] = sender, end
        try:
            yield
        finally:
            self._held.pop(key, None)

    def _take_back(self, newcomer: bytes) -> None:
        counts = Counter([newcomer, *(sender for sender, _ in self._held.values())])
        most = max(counts[sender] for sender, _ in self._held.values())
        oldest = next(key for key, (sender, _) in self._held.items() if counts[sender] == most)
        _, end = self._held.pop(oldest)
        end()
