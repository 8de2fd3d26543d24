"""Measures the time of the dispatcher's stages."""

import time
from collections.abc import Mapping

# In the order in which a call passes through them.
STAGES = ("gate", "gather", "send", "wait", "kernel", "scatter")


class Stopwatch:
    """Adds up how often each stage ran and how long it took. Used from the dispatcher's thread alone.

    gate: choosing the experts. gather: collecting the rows for an organ, into shared memory where that is used. send:
    handing them over, without the kernel where that runs in this process. wait: until the answer is there. kernel: the
    experts' own time, as they report it; in another process it passes while this thread does other things, so it is no
    part of the sum of the others. scatter: adding the organs' parts to the rows.
    """

    def __init__(self) -> None:
        self.reset()

    def add(self, stage: str, seconds: float) -> None:
        """Counts one run of a stage.

        Raises:
            KeyError: there is no such stage; see `STAGES`.
        """
        self._counts[stage] += 1
        self._seconds[stage] += seconds

    def lap(self, stage: str, since: float) -> None:
        """Counts one run of a stage that began at `since`, of `time.perf_counter`, and ends now."""
        self.add(stage, time.perf_counter() - since)

    def totals(self) -> Mapping[str, tuple[int, float]]:
        """Stage → how often, and seconds in all; every stage of `STAGES` is there."""
        return {stage: (self._counts[stage], self._seconds[stage]) for stage in STAGES}

    def reset(self) -> None:
        """Starts again from zero."""
        self._counts = dict.fromkeys(STAGES, 0)
        self._seconds = dict.fromkeys(STAGES, 0.0)
