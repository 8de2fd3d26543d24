"""Scores of the paper's comparison: each variant over all seeds, and one variant against another, pair by pair."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.paper_table_training import Cell
from benchmarks.paper_table_variants import BASELINE, MOE, VARIANTS
from echovlm_ray.evaluation.baselines import commonest_answers, shuffled
from echovlm_ray.evaluation.items import Item
from echovlm_ray.evaluation.scoring import Answered, metrics_of
from echovlm_ray.evaluation.settings import ScoreSettings
from echovlm_ray.evaluation.statistics import Statistic, clusters_of, compare, intervals

METRICS = ("BLEU-1 (words)", "ROUGE-1 (words)", "attribute F1", "all attributes right", "diagnosis accuracy")
# Those that the paper's gains are of, and what no comparison of words may be shown without.
BLEU, ROUGE, ATTRIBUTES = METRICS[:3]
SETTINGS = ScoreSettings(draws=2000)
Found = dict[str, Statistic]


@dataclass(frozen=True, slots=True)
class Value:
    """A metric of one variant, on all held-out records and all seeds together.

    Attributes:
        low, high: the bootstrap's interval of 95 %; a record is drawn with the answers of all seeds.
        seeds: the metric of each seed.
    """

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Gain:
    """How much one variant has more than another, on the same records and the same seeds.

    Attributes:
        low, high: the paired bootstrap's interval of 95 % over records.
        p_value: of approximate randomisation over records.
        seeds: the difference of each seed.
    """

    value: float
    low: float
    high: float
    p_value: float
    seeds: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """Whether the difference is significant over the records and over the seeds."""
        if self.low <= 0 <= self.high:
            return "no difference shown"
        if len({seed > 0 for seed in self.seeds}) > 1:
            return "the seeds disagree"
        return "better" if self.value > 0 else "worse"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One variant against another: metric → gain."""

    variant: str
    against: str
    gains: dict[str, Gain]


@dataclass(frozen=True, slots=True)
class Scores:
    """Everything that was measured of answers.

    Attributes:
        values: variant, or name of a baseline that owes nothing to looking → metric → value.
        comparisons: see `comparisons_of`.
    """

    values: dict[str, dict[str, Value]]
    comparisons: list[Comparison]

    def as_json(self) -> dict[str, Any]:
        """For the file of results."""
        return asdict(self)


def scores_of(items: Sequence[Item], cells: Sequence[Cell]) -> Scores:
    """All scores of some cells; every variant has the same seeds.

    Args:
        items: the held-out records.
        cells: one for each variant and seed.
    """
    seeds = sorted({cell.seed for cell in cells})
    found = {(cell.variant, cell.seed): _statistics(items, cell.answers) for cell in cells}
    names = [variant.name for variant in VARIANTS if (variant.name, seeds[0]) in found]
    by_variant = {name: [found[name, seed] for seed in seeds] for name in names}
    values = {name: _values(items, each) for name, each in by_variant.items()}
    best = MOE if MOE in names else names[0]
    partners = shuffled(items, SETTINGS.seed)
    # An answer depends only on the picture, so another picture's answer is the answer to that picture.
    exchanged = [
        _statistics(items, [cell.answers[partner] for partner in partners]) for cell in cells if cell.variant == best
    ]
    values[f"{best}, shown other pictures"] = _values(items, exchanged)
    values["the organ's commonest report"] = _values(items, [_statistics(items, commonest_answers(items))])
    return Scores(values, comparisons_of(items, by_variant))


def comparisons_of(items: Sequence[Item], by_variant: Mapping[str, Sequence[Found]]) -> list[Comparison]:
    """The MoE and everything else against the dense baseline, then every other variant against the MoE."""
    pairs = [(name, BASELINE) for name in by_variant if name != BASELINE]
    pairs += [(name, MOE) for name in by_variant if name not in (BASELINE, MOE)]
    pairs.append(("by-organ", "ungated-large"))
    return [
        Comparison(name, against, _gains(items, by_variant[against], by_variant[name]))
        for name, against in pairs
        if name in by_variant and against in by_variant
    ]


def _statistics(items: Sequence[Item], answers: Sequence[str]) -> Found:
    metrics, _ = metrics_of(items, Answered("model", answers, [None] * len(items)))
    return {metric.name: metric.statistic for metric in metrics if metric.name in METRICS and metric.statistic}


def _pooled(found: Sequence[Found], metric: str) -> Statistic:
    """One row for each seed and record."""
    first = found[0][metric]
    return Statistic(np.concatenate([each[metric].rows for each in found]), first.reduce, first.reason)


def _values(items: Sequence[Item], found: Sequence[Found]) -> dict[str, Value]:
    pooled = [_pooled(found, metric) for metric in METRICS]
    bounds = intervals(pooled, _clusters(items, len(found)), draws=SETTINGS.draws, seed=SETTINGS.seed)
    values = {}
    for metric, statistic, bound in zip(METRICS, pooled, bounds, strict=True):
        low, high = bound or (float("nan"), float("nan"))
        values[metric] = Value(statistic.value(), low, high, tuple(each[metric].value() for each in found))
    return values


def _gains(items: Sequence[Item], first: Sequence[Found], second: Sequence[Found]) -> dict[str, Gain]:
    clusters = _clusters(items, len(first))
    gains = {}
    for metric in METRICS:
        one, other = _pooled(first, metric), _pooled(second, metric)
        found = compare(one, other, clusters, draws=SETTINGS.draws, seed=SETTINGS.seed)
        assert found.low is not None
        assert found.high is not None
        each = tuple(b[metric].value() - a[metric].value() for a, b in zip(first, second, strict=True))
        gains[metric] = Gain(found.value, found.low, found.high, found.p_value, each)
    return gains


def _clusters(items: Sequence[Item], seeds: int) -> Any:
    return np.tile(clusters_of([item.cluster for item in items]), seeds)
