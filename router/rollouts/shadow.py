"""How far a shadow's answers agree with the incumbent's. Stores numbers only, never tokens."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True, slots=True)
class ShadowRecord:
    """The comparison of one request's two answers.

    Attributes:
        tokens: the length of the longer answer.
        shared_tokens: the size of the multiset intersection of both answers' tokens.
        first_divergence: the first position, from 0, at which they differ; None if they are identical.
        latency_ratio: the candidate's seconds per token over the incumbent's; None if it was not measured.
    """

    tokens: int
    shared_tokens: int
    first_divergence: int | None
    latency_ratio: float | None = None

    @classmethod
    def of(
        cls,
        incumbent_ids: Sequence[int],
        candidate_ids: Sequence[int],
        *,
        incumbent_s_per_token: float | None = None,
        candidate_s_per_token: float | None = None,
    ) -> Self:
        """Compares two answers. Only counts of the token ids are stored."""
        shared = sum((Counter(incumbent_ids) & Counter(candidate_ids)).values())
        common = min(len(incumbent_ids), len(candidate_ids))
        first = next((at for at in range(common) if incumbent_ids[at] != candidate_ids[at]), None)
        if first is None and len(incumbent_ids) != len(candidate_ids):
            first = common
        ratio = (
            candidate_s_per_token / incumbent_s_per_token if incumbent_s_per_token and candidate_s_per_token else None
        )
        return cls(max(len(incumbent_ids), len(candidate_ids)), shared, first, ratio)


class ShadowReport(BaseModel):
    """The sum of one rollout's comparisons."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: int = 0
    identical: int = 0
    tokens: int = 0
    shared_tokens: int = 0
    # Over the requests that diverged.
    first_divergence_sum: int = 0
    first_divergence_min: int | None = None
    # Over the requests whose latency was measured.
    latency_measured: int = 0
    latency_log_ratio_sum: float = 0.0

    @property
    def token_overlap(self) -> float | None:
        """Shared tokens over tokens; None before the first comparison."""
        return self.shared_tokens / self.tokens if self.tokens else None

    @property
    def identical_rate(self) -> float | None:
        """Identical answers over all answers; None before the first comparison."""
        return self.identical / self.requests if self.requests else None

    @property
    def mean_first_divergence(self) -> float | None:
        """The mean position of the first divergence, over the answers that diverge."""
        diverged = self.requests - self.identical
        return self.first_divergence_sum / diverged if diverged else None

    @property
    def latency_ratio(self) -> float | None:
        """The geometric mean of the candidate's time per token over the incumbent's."""
        return math.exp(self.latency_log_ratio_sum / self.latency_measured) if self.latency_measured else None

    def with_records(self, records: Iterable[ShadowRecord]) -> "ShadowReport":
        """The report with more comparisons."""
        report = self
        for record in records:
            report = report._with(record)
        return report

    def _with(self, record: ShadowRecord) -> "ShadowReport":
        first = record.first_divergence
        known = self.first_divergence_min
        ratio = record.latency_ratio
        return ShadowReport(
            requests=self.requests + 1,
            identical=self.identical + (first is None),
            tokens=self.tokens + record.tokens,
            shared_tokens=self.shared_tokens + record.shared_tokens,
            first_divergence_sum=self.first_divergence_sum + (first or 0),
            first_divergence_min=known if first is None else first if known is None else min(first, known),
            latency_measured=self.latency_measured + (ratio is not None),
            latency_log_ratio_sum=self.latency_log_ratio_sum + (math.log(ratio) if ratio is not None else 0.0),
        )
