"""What a load trial found: goodput, latencies and errors of one offered rate, as a row and as JSON.

Goodput counts the requests that met both latency targets: time to the first token and time per further token (Zhong et
al. 2024, arXiv 2401.09670).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.measure_table import table_head
from benchmarks.open_loop import Outcome, Trial
from benchmarks.timings import percentile

PERCENTS = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Targets:
    """The latencies within which a request counts, in seconds."""

    first_text_s: float
    per_token_s: float

    def met_by(self, outcome: Outcome) -> bool:
        """Whether a request was answered, and within both."""
        in_time = outcome.first_text_s <= self.first_text_s and outcome.per_token_s <= self.per_token_s
        return outcome.completed and not outcome.error and in_time

    def __str__(self) -> str:
        return (
            f"first token within {1e3 * self.first_text_s:,.0f} ms and {1e3 * self.per_token_s:,.0f} ms for each "
            "further token"
        )


@dataclass(frozen=True, slots=True)
class RateResult:
    """One offered rate.

    Attributes:
        offered: requests a second that were to arrive, on average.
        arrived: requests a second that did.
        attained: answers a second until the last one.
        goodput: answers within the targets, for each second in which requests arrived.
        good_share: their part of all requests that ended by themselves, from 0 to 1.
        errors: kind of failure → how many.
        latencies_ms: measure → percentile → milliseconds; empty where nothing was answered.
        lag_ms: p99 of how late requests were sent, which only the load generator is to blame for.
        cut_short: whether the rate was not offered for the whole time.
    """

    offered: float
    seconds: float
    requests: int
    arrived: float
    attained: float
    goodput: float
    good_share: float
    errors: dict[str, int]
    latencies_ms: dict[str, dict[str, float]]
    lag_ms: float
    cut_short: bool

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


def result_of(trial: Trial, targets: Targets) -> RateResult:
    """Sums up a trial; what had not ended when it was cut short counts neither way."""
    outcomes = trial.outcomes
    answered = [outcome for outcome in outcomes if outcome.completed and not outcome.error]
    good = sum(targets.met_by(outcome) for outcome in outcomes)
    return RateResult(
        offered=trial.rate,
        seconds=trial.open_s,
        requests=trial.arrived,
        arrived=trial.arrived / trial.open_s if trial.open_s else 0.0,
        attained=len(answered) / trial.whole_s if trial.whole_s else 0.0,
        goodput=good / trial.open_s if trial.open_s else 0.0,
        good_share=good / len(outcomes) if outcomes else 0.0,
        errors=dict(sorted(Counter(outcome.error for outcome in outcomes if outcome.error).items())),
        latencies_ms=_latencies(answered),
        lag_ms=1e3 * percentile([outcome.lag_s for outcome in outcomes], 99) if outcomes else 0.0,
        cut_short=trial.cut_short,
    )


def _latencies(answered: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    if not answered:
        return {}
    values = {
        "first text": [outcome.first_text_s for outcome in answered],
        "per token": [outcome.per_token_s for outcome in answered],
        "between pieces": [later - sooner for outcome in answered for sooner, later in pairwise(outcome.pieces)],
        "whole answer": [outcome.end_s for outcome in answered],
    }
    return {
        measure: {f"p{percent}": 1e3 * percentile(times, percent) for percent in PERCENTS}
        for measure, times in values.items()
        if times
    }


def rate_table(results: Sequence[RateResult]) -> list[str]:
    """All rates, as lines of Markdown."""
    lines = table_head(
        "| offered, requests/s | arrived | answered/s | **goodput/s** | in time | errors | first text, ms: p50 | p99 "
        "| per token, ms: p50 | p99 | whole answer, ms: p50 | p99 |"
    )
    for result in results:
        errors = ", ".join(f"{count} {kind}" for kind, count in result.errors.items()) or "none"
        offered = f"{result.offered:g}" + (f" (stopped after {result.seconds:.0f} s)" if result.cut_short else "")
        cells = [
            f"{result.latencies_ms[measure][percent]:,.0f}" if measure in result.latencies_ms else ""
            for measure in ("first text", "per token", "whole answer")
            for percent in ("p50", "p99")
        ]
        lines.append(
            f"| {offered} | {result.arrived:.2f} | {result.attained:.2f} | **{result.goodput:.2f}** "
            f"| {100 * result.good_share:.0f} % | {errors} | {' | '.join(cells)} |"
        )
    return lines
