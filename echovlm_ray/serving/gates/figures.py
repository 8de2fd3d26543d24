"""Computes a gate's figures from answers: the metric, its interval, and the paired difference from the incumbent."""

from collections.abc import Sequence

from echovlm_ray.evaluation.items import Item
from echovlm_ray.evaluation.scoring import METRIC_NAMES, Metric, substance_metrics
from echovlm_ray.evaluation.statistics import NotComputableError, Statistic, clusters_of, compare, intervals
from router.rollouts.gates import Comparison, Evidence, Gate, UnusableGateError

# Resamples of the bootstrap.
DRAWS = 1000
SEED = 0


def metric_key(name: str) -> str:
    """How a gate writes the name of a metric: "attribute F1" is attribute_f1."""
    return name.lower().replace(" ", "_").replace("-", "_")


def check_metric(gate: Gate, items: Sequence[Item]) -> None:
    """Checks that a gate's metric can be computed on records, as if all answers were right.

    Raises:
        UnusableGateError: there is no such metric, or the records do not allow it.
    """
    known = [metric_key(name) for name in METRIC_NAMES]
    if gate.metric not in known:
        raise UnusableGateError(f"there is no metric {gate.metric!r}: choose one of {', '.join(known)}")
    metric = _metric(gate, items, [item.references[0] if item.references else "" for item in items])
    if gate.not_below_incumbent_by is not None and len(set(_clusters(items, metric))) < 2:
        raise UnusableGateError(
            f"{gate.subject} cannot be compared with the incumbent's on one patient: a dataset of at least two is "
            "needed, and of many to find small losses"
        )


def evidence_of(
    gate: Gate,
    items: Sequence[Item],
    answers: Sequence[str],
    dataset_digest: str,
    incumbent: tuple[str, Sequence[str]] | None,
) -> Evidence:
    """The figures of a gate.

    Args:
        gate: names the metric.
        items: the records.
        answers: the candidate's, one a record.
        dataset_digest: of the records and images.
        incumbent: its bundle's digest and its answers, where the gate compares.

    Raises:
        UnusableGateError: the metric cannot be computed on them.
    """
    metric = _metric(gate, items, answers)
    assert metric.statistic is not None
    clusters = clusters_of(_clusters(items, metric))
    (bounds,) = intervals([metric.statistic], clusters, draws=DRAWS, seed=SEED)
    low, high = bounds or (None, None)
    comparison = None
    if incumbent is not None:
        comparison = _compared(gate, metric.statistic, items, *incumbent)
    return Evidence(
        value=metric.statistic.value(),
        low=low,
        high=high,
        records=len(metric.places),
        dataset_digest=dataset_digest,
        comparison=comparison,
    )


def _compared(
    gate: Gate, candidate: Statistic, items: Sequence[Item], incumbent_digest: str, answers: Sequence[str]
) -> Comparison:
    metric = _metric(gate, items, answers)
    assert metric.statistic is not None
    try:
        found = compare(metric.statistic, candidate, clusters_of(_clusters(items, metric)), draws=DRAWS, seed=SEED)
    except NotComputableError as error:
        raise UnusableGateError(f"{gate.subject} cannot be compared with the incumbent's: {error}") from None
    if found.low is None or found.high is None:
        raise UnusableGateError(
            f"{gate.subject} cannot be compared with the incumbent's: too few records for an interval"
        )
    return Comparison(
        incumbent_digest=incumbent_digest,
        incumbent_value=metric.statistic.value(),
        difference=found.value,
        low=found.low,
        high=found.high,
    )


def _metric(gate: Gate, items: Sequence[Item], answers: Sequence[str]) -> Metric:
    metric = next(found for found in substance_metrics(items, answers) if metric_key(found.name) == gate.metric)
    if metric.statistic is None:
        raise UnusableGateError(f"{gate.subject} cannot be computed on {gate.dataset}: {metric.error}")
    try:
        metric.statistic.value()
    except NotComputableError as error:
        raise UnusableGateError(f"{gate.subject} cannot be computed on {gate.dataset}: {error}") from None
    return metric


def _clusters(items: Sequence[Item], metric: Metric) -> list[str]:
    return [items[place].cluster for place in metric.places]
