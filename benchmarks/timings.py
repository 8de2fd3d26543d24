"""Arrival times of the tokens of several streams, and statistics of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy


@dataclass(frozen=True, slots=True)
class Timings:
    """One run of a workload. All times are seconds since the first stream was submitted.

    Attributes:
        prompt_tokens: of all streams together.
        submitted: when each stream was.
        tokens: arrival times of each stream's tokens.
    """

    prompt_tokens: int
    submitted: tuple[float, ...]
    tokens: tuple[tuple[float, ...], ...]

    @property
    def time_to_first_token(self) -> list[float]:
        """Of every stream, in seconds."""
        return [times[0] - submitted for submitted, times in zip(self.submitted, self.tokens, strict=True)]

    @property
    def inter_token_latency(self) -> list[float]:
        """Every pause between two tokens of a stream, in seconds."""
        return [later - sooner for times in self.tokens for sooner, later in pairwise(times)]

    @property
    def prefill_tokens_per_s(self) -> float:
        """All prompt tokens, over the time until the last stream has its first token."""
        return self.prompt_tokens / max(times[0] for times in self.tokens)

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens of all streams together, over the time in which all of them decode.

        That is from the moment when the last stream has its first token to the one when the first stream has its last.

        Raises:
            ValueError: there is no such time: a stream ended before another one began.
        """
        begin = max(times[0] for times in self.tokens)
        end = min(times[-1] for times in self.tokens)
        if end <= begin:
            raise ValueError("a stream ended before another one began: let the streams make more tokens (--new-tokens)")
        return sum(1 for times in self.tokens for time in times if begin < time <= end) / (end - begin)

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all streams, over the whole time, prefill included."""
        return sum(len(times) for times in self.tokens) / max(times[-1] for times in self.tokens)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"prompt_tokens": self.prompt_tokens, "submitted": self.submitted, "tokens": self.tokens}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Reads what `to_json` made."""
        return cls(value["prompt_tokens"], tuple(value["submitted"]), tuple(tuple(times) for times in value["tokens"]))


def nearest_rank(values: Sequence[float], percent: float) -> float:
    """A percentile that is one of the values, the next one above."""
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which that part of all values lies, between neighbours in proportion."""
    return float(numpy.percentile(values, percent))
