"""Counts the examples that a run skips because they cannot be used, and logs each once."""

import logging

from echovlm_ray.training.examples import ExampleError

logger = logging.getLogger(__name__)


def reason_of(error: ExampleError, place: str) -> str:
    """Why an example cannot be used, with its position first."""
    text = str(error)
    return text if text.startswith(place) else f"{place}: {text}"


class SkippedExamples:
    """The skipped examples so far. Each worker process that reads examples has its own count."""

    def __init__(self) -> None:
        self._indices: set[int] = set()

    def __len__(self) -> int:
        """The number of skipped examples."""
        return len(self._indices)

    def add(self, index: int, reason: str) -> None:
        """Logs a warning with the reason, once for each example."""
        if index not in self._indices:
            self._indices.add(index)
            logger.warning("skipped, %d so far: %s", len(self), reason)
