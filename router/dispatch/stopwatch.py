"""Measures the dispatcher's stages."""

import time
from collections.abc import Mapping

# In the order of a call.
STAGES = ("gate", "gather", "send", "wait", "kernel", "scatter")


class Stopwatch:
    """Counts the runs of each stage and adds up their time. Used by the dispatcher's thread only.

    gate: choosing the experts. gather: collecting an organ's rows, in shared memory if it is used. send: sending them,
        without the kernel of local experts. wait: waiting for the answer. kernel: the experts' time, as they report it;
        with remote experts it overlaps with this thread, so it is not part of the sum. scatter: adding the organs'
        outputs to the rows.
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
        """Counts one run of a stage that began at `since` (`time.perf_counter`) and ends now."""
        self.add(stage, time.perf_counter() - since)

    def totals(self) -> Mapping[str, tuple[int, float]]:
        """Stage → number of runs and total seconds, for every stage of `STAGES`."""
        return {stage: (self._counts[stage], self._seconds[stage]) for stage in STAGES}

    def reset(self) -> None:
        """Sets all counters to zero."""
        self._counts = dict.fromkeys(STAGES, 0)
        self._seconds = dict.fromkeys(STAGES, 0.0)
