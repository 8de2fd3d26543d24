"""Compares two evaluations of the same questions: the difference of each metric, its interval, and a paired test."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from echovlm_ray.evaluation.answers import Answer, read_answers
from echovlm_ray.evaluation.baselines import ASKED, Variant
from echovlm_ray.evaluation.items import Item
from echovlm_ray.evaluation.result import SUBSTANCE, WITHHELD, EvaluationResult
from echovlm_ray.evaluation.run import ANSWERS_FILE, RESULT_FILE, dataset_digest, variants_of
from echovlm_ray.evaluation.scoring import Metric, groups_of, metrics_of
from echovlm_ray.evaluation.settings import Target
from echovlm_ray.evaluation.statistics import NotComputableError, clusters_of, compare


class ComparisonError(ValueError):
    """Two evaluations cannot be compared; the text has the reason."""


class ComparedMetric(BaseModel):
    """One metric of both evaluations on the same records.

    Attributes:
        words: whether it compares words only.
        difference: the second minus the first; with the interval of 95 % of it.
        p_value: of approximate randomisation; of one test, not corrected for how many there are.
        error: why the metric cannot be compared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: str
    group: str
    name: str
    words: bool
    records: int
    first: float | None = None
    second: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    error: str = ""


class Comparison(BaseModel):
    """Two evaluations side by side."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: Target
    second: Target
    records: int
    draws: int
    notices: list[str]
    metrics: list[ComparedMetric]


def read_result(directory: Path) -> EvaluationResult:
    """The result in an evaluation's folder.

    Raises:
        ComparisonError: there is none, or it is of another format.
    """
    path = directory / RESULT_FILE
    try:
        return EvaluationResult.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ComparisonError(f"{directory} has no {RESULT_FILE}: finish that evaluation first") from None
    except ValueError:
        raise ComparisonError(f"{path} is no result of this version of `echoray eval`: evaluate again") from None


def stored_answers(
    directory: Path, result: EvaluationResult, items: Sequence[Item]
) -> dict[Variant, dict[int, Answer]]:
    """The answers of a finished evaluation: variant → item index → answer.

    Raises:
        ComparisonError: the dataset differs from the evaluated one.
        AnswerLogError: the file of answers is damaged.
    """
    if dataset_digest(items) != result.dataset_digest:
        raise ComparisonError(
            f"{directory} evaluated other records than these: give the same dataset, and the same --limit"
        )
    by_name = {
        (answer.id, answer.variant): answer
        for answer in read_answers(directory / ANSWERS_FILE).values()
        if answer.settings == result.settings
    }
    return {
        variant: {item.index: by_name[item.id, variant] for item in items if (item.id, variant) in by_name}
        for variant in ASKED
    }


def compare_runs(items: Sequence[Item], first: Path, second: Path, *, draws: int, seed: int) -> Comparison:
    """Compares the model's answers of two finished evaluations of the same dataset.

    Raises:
        ComparisonError: one of them is not finished, or their records differ.
    """
    results = [read_result(directory) for directory in (first, second)]
    found = []
    notices = []
    for directory, result in zip((first, second), results, strict=True):
        if result.failed:
            raise ComparisonError(f"{directory} is not complete: evaluate again, which asks what is missing")
        answers = stored_answers(directory, result, items)
        found.append(metrics_of(items, variants_of(items, answers)[0])[0])
    if results[0].asking != results[1].asking:
        notices.append("the two were asked in different ways, so the difference is not the model's alone")
    if results[0].settings == results[1].settings:
        notices.append("both are the same model, asked in the same way")
    metrics: list[ComparedMetric] = []
    for (by, name), places in groups_of(items).items():
        if by != "class":
            metrics += _group(items, by, name, places, found[0], found[1], draws, seed)
    return Comparison(
        first=results[0].target,
        second=results[1].target,
        records=len(items),
        draws=draws,
        notices=notices,
        metrics=metrics,
    )


def _group(
    items: Sequence[Item],
    by: str,
    name: str,
    places: Sequence[int],
    first: Sequence[Metric],
    second: Sequence[Metric],
    draws: int,
    seed: int,
) -> list[ComparedMetric]:
    compared = []
    inside = set(places)
    for ours, theirs in zip(first, second, strict=True):
        rows = [row for row, place in enumerate(ours.places) if place in inside]
        head = {"by": by, "group": name, "name": ours.name, "words": ours.kind == "words", "records": len(rows)}
        if not rows or ours.statistic is None or theirs.statistic is None or ours.places != theirs.places:
            continue
        clusters = clusters_of([items[ours.places[row]].cluster for row in rows])
        one, other = ours.statistic.take(rows), theirs.statistic.take(rows)
        try:
            difference = compare(one, other, clusters, draws=draws, seed=seed)
        except NotComputableError as error:
            compared.append(ComparedMetric.model_validate(head | {"error": str(error)}))
            continue
        values = {"first": one.value(), "second": other.value(), "difference": difference.value}
        bounds = {"low": difference.low, "high": difference.high, "p_value": difference.p_value}
        compared.append(ComparedMetric.model_validate(head | values | bounds))
    if any(metric.name in SUBSTANCE and not metric.error for metric in compared):
        return compared
    return [_withheld(metric) if metric.words else metric for metric in compared]


def _withheld(metric: ComparedMetric) -> ComparedMetric:
    return ComparedMetric(
        by=metric.by, group=metric.group, name=metric.name, words=True, records=metric.records, error=WITHHELD
    )
