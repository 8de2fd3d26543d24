"""Scores as sums over records, so that a bootstrap and a paired test need not read the texts again.

A metric is a table of one row a record and a function from the sum of rows to the score: BLEU's counts, the hits and
misses of a class, a mean's sum and number. Records of one patient are drawn together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from echovlm_ray.data.draws import draws_of

Array = npt.NDArray[np.float64]
# Rows of sums → scores; NaN where a sum allows none.
Reduce = Callable[[Array], Array]
CONFIDENCE = 0.95
# Drawn at a time, which bounds the memory.
CHUNK = 250
# Of the draws, so many may allow no score; beyond it an interval of the others would mislead.
MAX_UNDEFINED = 0.05


class NotComputableError(ValueError):
    """A metric cannot be computed on these records; the text has the reason."""


@dataclass(frozen=True, slots=True, eq=False)
class Statistic:
    """One metric on some records.

    Attributes:
        rows: records × what each adds, float64.
        reduce: sums of rows → scores.
        reason: what it means when there is no score.
    """

    rows: Array
    reduce: Reduce
    reason: str = "there is nothing to compute it from"

    def take(self, indices: Sequence[int]) -> "Statistic":
        """The metric on some of the records."""
        return Statistic(self.rows[list(indices)], self.reduce, self.reason)

    def spread(self, places: Sequence[int], count: int) -> "Statistic":
        """The same metric among `count` records, of which only those at `places` add to it."""
        rows = np.zeros((count, self.rows.shape[1]))
        rows[list(places)] = self.rows
        return Statistic(rows, self.reduce, self.reason)

    def value(self) -> float:
        """The score on all records.

        Raises:
            NotComputableError: they allow none.
        """
        if not len(self.rows):
            raise NotComputableError("there is no record for it")
        score = float(self.reduce(self.rows.sum(axis=0, keepdims=True))[0])
        if np.isnan(score):
            raise NotComputableError(self.reason)
        return score


def clusters_of(keys: Sequence[str]) -> npt.NDArray[np.int64]:
    """The number of each record's cluster: records with the same key belong together."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def intervals(
    statistics: Sequence[Statistic], clusters: npt.NDArray[np.int64], *, draws: int, seed: int
) -> list[tuple[float, float] | None]:
    """The percentile bootstrap's intervals of 95 % of several metrics on the same records, by the same resamples.

    Args:
        statistics: with one row for each record; a record that a metric leaves out has a row of zeros.
        clusters: see `clusters_of`; one number for each record.
        draws: resamples.
        seed: of the draws.

    Returns:
        for each metric its interval; None with a single cluster, or where too many draws allow no score.
    """
    if not statistics or len(np.unique(clusters)) < 2:
        return [None] * len(statistics)
    sums = _cluster_sums(np.concatenate([statistic.rows for statistic in statistics], axis=1), clusters)
    ends = np.cumsum([statistic.rows.shape[1] for statistic in statistics])
    parts = _resampled(sums, draws, seed)
    found = []
    for statistic, end in zip(statistics, ends, strict=True):
        columns = slice(int(end) - statistic.rows.shape[1], int(end))
        found.append(_percentiles(np.concatenate([statistic.reduce(part[:, columns]) for part in parts])))
    return found


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired comparison of two versions on the same records.

    Attributes:
        value: score of the second minus score of the first.
        low, high: the paired bootstrap's interval of 95 %, or None.
        p_value: of approximate randomisation, two-sided: how often an exchange of the two versions' answers at random
            differs as much.
    """

    value: float
    low: float | None
    high: float | None
    p_value: float


def compare(
    first: Statistic, second: Statistic, clusters: npt.NDArray[np.int64], *, draws: int, seed: int
) -> Difference:
    """Tests whether two versions differ in a metric; their rows must be the same records.

    The test is approximate randomisation (Noreen 1989), over clusters, with one added to both counts.

    Raises:
        NotComputableError: a version has no score, or there are fewer than two clusters.
    """
    observed = second.value() - first.value()
    ours, theirs = _cluster_sums(first.rows, clusters), _cluster_sums(second.rows, clusters)
    if len(ours) < 2:
        raise NotComputableError("a test needs at least two patients, or records where patients are not known")
    pairs = np.concatenate([ours, theirs], axis=1)
    width = ours.shape[1]
    resampled = np.concatenate(
        [second.reduce(part[:, width:]) - first.reduce(part[:, :width]) for part in _resampled(pairs, draws, seed)]
    )
    bounds = _percentiles(resampled)
    as_much = sum(
        int((np.abs(found) >= abs(observed) - 1e-12).sum())
        for found in _exchanged(ours, theirs, first.reduce, draws, seed)
    )
    low, high = bounds or (None, None)
    return Difference(observed, low, high, (as_much + 1) / (draws + 1))


def _cluster_sums(rows: Array, clusters: npt.NDArray[np.int64]) -> Array:
    sums = np.zeros((int(clusters.max(initial=-1)) + 1, rows.shape[1]))
    np.add.at(sums, clusters, rows)
    # Of some records only some clusters are left.
    return sums[np.unique(clusters)]


def _resampled(sums: Array, draws: int, seed: int) -> list[Array]:
    """The sums of resampled clusters, some draws at a time."""
    count = len(sums)
    parts = []
    for start in range(0, draws, CHUNK):
        generator = draws_of(seed, 0, start)
        number = min(CHUNK, draws - start)
        weights = generator.multinomial(count, np.full(count, 1 / count), size=number)
        parts.append(weights.astype(np.float64) @ sums)
    return parts


def _exchanged(ours: Array, theirs: Array, reduce: Reduce, draws: int, seed: int) -> list[Array]:
    """Differences after each cluster's answers were exchanged between the versions, or not, at random."""
    gap = theirs - ours
    total_ours, total_theirs = ours.sum(axis=0), theirs.sum(axis=0)
    found = []
    for start in range(0, draws, CHUNK):
        generator = draws_of(seed, 1, start)
        number = min(CHUNK, draws - start)
        moved = generator.integers(0, 2, size=(number, len(gap))).astype(np.float64) @ gap
        difference = reduce(total_theirs - moved) - reduce(total_ours + moved)
        # An exchange that leaves one version without a score counts as one that differs as much.
        found.append(np.where(np.isnan(difference), np.inf, difference))
    return found


def _percentiles(scores: Array) -> tuple[float, float] | None:
    defined = scores[~np.isnan(scores)]
    if len(defined) < (1 - MAX_UNDEFINED) * len(scores):
        return None
    low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def mean_statistic(values: Sequence[float], reason: str = "") -> Statistic:
    """The mean of one value a record."""
    rows = np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1)
    return Statistic(rows, _ratio, reason or "there is no record for it")


def f1_statistic(counts: Sequence[tuple[int, int, int]], reason: str) -> Statistic:
    """Micro F1 of (true positives, false positives, false negatives) a record."""
    return Statistic(np.asarray(counts, dtype=np.float64).reshape(len(counts), 3), _f1, reason)


def macro_f1_statistic(truths: Sequence[str], answers: Sequence[str | None]) -> Statistic:
    """Macro F1 over the classes that occur as truth. An answer that is none of them is a miss of the true class."""
    classes = sorted(set(truths))
    number = {name: index for index, name in enumerate(classes)}
    rows = np.zeros((len(truths), len(classes), 3))
    for index, (truth, answer) in enumerate(zip(truths, answers, strict=True)):
        if truth == answer:
            rows[index, number[truth], 0] = 1
            continue
        rows[index, number[truth], 2] = 1
        if answer in number:
            rows[index, number[answer], 1] = 1
    return Statistic(rows.reshape(len(truths), 3 * len(classes)), _macro_f1, "there is no record for it")


def _ratio(sums: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[:, 0] / sums[:, 1])


def _f1(sums: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(2 * sums[:, 0] / (2 * sums[:, 0] + sums[:, 1] + sums[:, 2]))


def _macro_f1(sums: Array) -> Array:
    counts = sums.reshape(len(sums), -1, 3)
    hits, wrong, missed = counts[..., 0], counts[..., 1], counts[..., 2]
    present = hits + missed > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        f1 = np.where(present, 2 * hits / (2 * hits + wrong + missed), 0.0)
        return np.asarray(f1.sum(axis=1) / present.sum(axis=1))
