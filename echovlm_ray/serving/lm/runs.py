"""One run of a request in the engine: its outputs, and its clean-up when the engine has released it."""

import time
from collections.abc import Callable

from echovlm_ray.engine.sequence import Sink, StepOutput
from echovlm_ray.serving.lm.admission import PinnedExperts, UsedBundle
from echovlm_ray.serving.lm.outcomes import Outcomes, seconds_per_token


class Run:
    """Forwards and counts a run's outputs, and at the end reports its outcome and releases the experts.

    The engine calls `sink` and `gone` from its thread. If the engine refuses the run, call `drop` instead.

    Attributes:
        token_ids: all tokens, where they are compared with another run's.
        error: what ended it, if anything did.
        complete: whether it made its last token.
        excluded_from_metrics: set if it does not count for its experts, because it was preempted.
    """

    def __init__(
        self,
        experts: PinnedExperts,
        judged: tuple[UsedBundle, ...],
        outcomes: Outcomes,
        *,
        sink: Sink | None = None,
        ended: Callable[[], None] | None = None,
    ) -> None:
        """Takes over the experts.

        Args:
            experts: that it computes with.
            judged: those of them that it says something about.
            outcomes: where it says so.
            sink: gets the outputs too.
            ended: called when the experts are free, from the engine's thread.
        """
        self._experts = experts
        self._judged = judged
        self._outcomes = outcomes
        self._sink = sink
        self._ended = ended
        self._first_at = 0.0
        self._last_at = time.monotonic()
        self.token_ids: list[int] = []
        self.error: Exception | None = None
        self.complete = False
        self.excluded_from_metrics = False

    @property
    def seconds_per_token(self) -> float | None:
        """The mean time between its tokens."""
        return seconds_per_token(self._first_at, self._last_at, len(self.token_ids))

    def sink(self, output: StepOutput | Exception) -> None:
        """Takes an output of the engine."""
        if isinstance(output, Exception):
            self.error = output
        else:
            now = time.monotonic()
            if not self.token_ids:
                self._first_at = now
            self._last_at = now
            self.token_ids.append(output.token_id)
            self.complete = output.finish is not None
            self._outcomes.note_token(self._experts.used, now)
        if self._sink is not None:
            self._sink(output)

    def gone(self) -> None:
        """Reports the outcome and releases the experts."""
        try:
            if not self.excluded_from_metrics:
                self._outcomes.record(
                    self._judged,
                    self.error,
                    tokens=len(self.token_ids),
                    seconds_per_token=self.seconds_per_token,
                    last_progress=self._last_at,
                    complete=self.complete,
                )
        finally:
            self.drop()
            if self._ended is not None:
                self._ended()

    def drop(self) -> None:
        """Releases the experts of a run that the engine refused."""
        self._experts.release()
