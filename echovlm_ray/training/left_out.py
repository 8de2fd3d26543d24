"""Examples that a run skips because they cannot be used: each is named once and counted."""

import logging

from echovlm_ray.training.examples import ExampleError

logger = logging.getLogger(__name__)


def reason_of(error: ExampleError, place: str) -> str:
    """Why an example cannot be used, beginning with its place."""
    text = str(error)
    return text if text.startswith(place) else f"{place}: {text}"


class LeftOut:
    """What was left out so far. A worker process that reads examples counts its own."""

    def __init__(self) -> None:
        self._indices: set[int] = set()

    def __len__(self) -> int:
        """How many examples were left out."""
        return len(self._indices)

    def add(self, index: int, reason: str) -> None:
        """Logs a warning with the reason, once for each example, however often it comes."""
        if index not in self._indices:
            self._indices.add(index)
            logger.warning("left out, %d so far: %s", len(self), reason)
