"""Scores answers: every metric over all records and for each group, with intervals. Add a metric in `metrics_of`."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from echovlm_ray.evaluation.baselines import Variant
from echovlm_ray.evaluation.items import Item
from echovlm_ray.evaluation.judging import ABNORMAL, NORMAL, Judgement, judge
from echovlm_ray.evaluation.ngrams import bert_score_metric, ngram_metrics
from echovlm_ray.evaluation.result import WITHHELD, Dimension, GroupScores, Score, shows_substance
from echovlm_ray.evaluation.settings import ScoreSettings
from echovlm_ray.evaluation.statistics import (
    NotComputableError,
    Statistic,
    clusters_of,
    f1_statistic,
    intervals,
    macro_f1_statistic,
    mean_statistic,
)
from echovlm_ray.tasks import LANGUAGES

_NO_TRUTH = {
    "attribute F1": "no record with a report, findings, impression, diagnosis or caption carries attributes",
    "all attributes right": "no record with a report, findings, impression, diagnosis or caption carries attributes",
    "diagnosis accuracy": "no record carries a diagnosis: attributes, or options with the right answer",
    "diagnosis macro-F1": "no record carries a diagnosis: attributes, or options with the right answer",
    "VQA accuracy": "no record is a question whose right answer can be told: attributes, or options with an answer",
    "VQA macro-F1": "no record is a question whose right answer can be told: attributes, or options with an answer",
    "sensitivity": "no record with an abnormal image carries attributes",
    "specificity": "no record with a normal image carries attributes",
    "organ gate": "nothing chose an organ (it was given, or the default answered, or one gate spans all organs), or no "
    "record names its organ",
}
# What `substance_metrics` computes, from 0 to 1: all but the organ gate's, which concerns requests that name no organ.
METRIC_NAMES = tuple(name for name in _NO_TRUTH if name != "organ gate")


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """A metric over the records that it concerns.

    Attributes:
        kind: a clinical metric, or a text metric.
        places: the indices of its items.
        statistic: one row for each of them; None if it cannot be computed, with the reason in `error`.
    """

    name: str
    kind: Literal["substance", "words"]
    places: tuple[int, ...]
    statistic: Statistic | None
    signature: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """The answers of one variant.

    Attributes:
        texts: one an item, in order; empty where there is no answer.
        organs: the organ that the gate chose for each, None where it did not choose.
    """

    variant: Variant
    texts: Sequence[str]
    organs: Sequence[str | None]


def metrics_of(
    items: Sequence[Item], answered: Answered, bert_model: Path | None = None
) -> tuple[list[Metric], list[Judgement]]:
    """Every metric over all items, and the judgement of each answer."""
    judgements = [judge(item, text) for item, text in zip(items, answered.texts, strict=True)]
    metrics = [*_substance(judgements), _organ_gate(items, answered)]
    for language in LANGUAGES:
        places = [place for place, item in enumerate(items) if item.language == language and item.kind == "text"]
        if not places:
            continue
        texts = [answered.texts[place] for place in places]
        references = [items[place].references for place in places]
        metrics += [
            Metric(found.name, "words", tuple(places), found.statistic, found.signature)
            for found in ngram_metrics(texts, references, language)
        ]
    if bert_model is not None:
        metrics.append(_bert_score(items, answered, bert_model))
    return metrics, judgements


def substance_metrics(items: Sequence[Item], texts: Sequence[str]) -> list[Metric]:
    """The clinical metrics of `METRIC_NAMES`.

    Args:
        items: the questions.
        texts: one answer an item; empty where there is none.
    """
    return _substance([judge(item, text) for item, text in zip(items, texts, strict=True)])


def _substance(judgements: Sequence[Judgement]) -> list[Metric]:
    stated = [place for place, found in enumerate(judgements) if found.attributes is not None]
    counts = [found.attributes for found in judgements if found.attributes is not None]
    exact = [float(found.exact) for found in judgements if found.exact is not None]
    diagnoses = {place: found.diagnosis for place, found in enumerate(judgements) if found.diagnosis is not None}
    choices = {place: found.choice for place, found in enumerate(judgements) if found.choice is not None}
    normal = {place: found.normal for place, found in enumerate(judgements) if found.normal is not None}
    metrics = [
        _metric("attribute F1", stated, f1_statistic(counts, "neither the answers nor the images have attributes")),
        _metric("all attributes right", stated, mean_statistic(exact)),
    ]
    for name, pairs in (("diagnosis", diagnoses), ("VQA", choices)):
        right = [float(truth == given) for truth, given in pairs.values()]
        truths, given = [pair[0] for pair in pairs.values()], [pair[1] for pair in pairs.values()]
        metrics.append(_metric(f"{name} accuracy", list(pairs), mean_statistic(right)))
        metrics.append(_metric(f"{name} macro-F1", list(pairs), macro_f1_statistic(truths, given)))
    for name, truth in (("sensitivity", ABNORMAL), ("specificity", NORMAL)):
        places = [place for place, pair in normal.items() if pair[0] == truth]
        metrics.append(_metric(name, places, mean_statistic([float(normal[place][1] == truth) for place in places])))
    return metrics


def _metric(name: str, places: Sequence[int], statistic: Statistic) -> Metric:
    return Metric(name, "substance", tuple(places), statistic if places else None, error=_NO_TRUTH[name])


def _organ_gate(items: Sequence[Item], answered: Answered) -> Metric:
    places = [
        place
        for place, (item, organ) in enumerate(zip(items, answered.organs, strict=True))
        if organ is not None and item.organ != "unknown" and item.media
    ]
    if not any(answered.organs[place] for place in places):
        # The default organ answered everywhere: there is no gate to judge.
        places = []
    right = [float(answered.organs[place] == items[place].organ) for place in places]
    return _metric("organ gate", places, mean_statistic(right))


def _bert_score(items: Sequence[Item], answered: Answered, model: Path) -> Metric:
    places = tuple(place for place, item in enumerate(items) if item.kind == "text")
    try:
        found = bert_score_metric(
            [answered.texts[place] for place in places], [items[place].references for place in places], model
        )
    except NotComputableError as error:
        return Metric("BERTScore", "words", places, None, error=str(error))
    return Metric(found.name, "words", places, found.statistic, found.signature)


def groups_of(items: Sequence[Item]) -> dict[tuple[Dimension, str], list[int]]:
    """The groups that scores are shown for: all records, and those of each organ, task, language and class."""
    groups: dict[tuple[Dimension, str], list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        groups["all", ""].append(place)
        groups["organ", item.organ].append(place)
        groups["task", item.task].append(place)
        groups["language", item.language].append(place)
        if item.attributes is not None:
            groups["class", f"{item.attributes.organ}: {item.attributes.class_name}"].append(place)
    order: list[Dimension] = ["all", "language", "task", "organ", "class"]
    return dict(sorted(groups.items(), key=lambda group: (order.index(group[0][0]), group[0][1])))


def group_scores(
    items: Sequence[Item], variant: Variant, metrics: Sequence[Metric], settings: ScoreSettings
) -> list[GroupScores]:
    """All metrics on all groups, with their intervals."""
    return [
        _scores(items, variant, by, name, places, metrics, settings) for (by, name), places in groups_of(items).items()
    ]


def _scores(
    items: Sequence[Item],
    variant: Variant,
    by: Dimension,
    name: str,
    places: Sequence[int],
    metrics: Sequence[Metric],
    settings: ScoreSettings,
) -> GroupScores:
    position = {place: index for index, place in enumerate(places)}
    scores: dict[str, dict[str, Score]] = {"substance": {}, "words": {}}
    computed: list[tuple[Metric, Statistic, float, int]] = []
    for metric in metrics:
        rows = [row for row, place in enumerate(metric.places) if place in position]
        if metric.statistic is None or not rows:
            if by == "all":
                # In a smaller group what concerns none of its records is left out.
                scores[metric.kind][metric.name] = Score(error=metric.error, signature=metric.signature)
            continue
        statistic = metric.statistic.take(rows)
        try:
            value = statistic.value()
        except NotComputableError as error:
            scores[metric.kind][metric.name] = Score(error=str(error), signature=metric.signature, records=len(rows))
            continue
        spread = statistic.spread([position[metric.places[row]] for row in rows], len(places))
        computed.append((metric, spread, value, len(rows)))
    clusters = clusters_of([items[place].cluster for place in places])
    bounds = intervals([entry[1] for entry in computed], clusters, draws=settings.draws, seed=settings.seed)
    for (metric, _, value, records), bound in zip(computed, bounds, strict=True):
        low, high = bound or (None, None)
        scores[metric.kind][metric.name] = Score(
            value=value, low=low, high=high, records=records, signature=metric.signature
        )
    words = scores["words"]
    if not shows_substance(scores["substance"]):
        words = {key: _withheld(score) for key, score in words.items()}
    return GroupScores(
        variant=variant,
        by=by,
        name=name,
        records=len(places),
        substance={
            metric.name: scores["substance"][metric.name] for metric in metrics if metric.name in scores["substance"]
        },
        words={metric.name: words[metric.name] for metric in metrics if metric.name in words},
    )


def _withheld(score: Score) -> Score:
    return Score(records=score.records, error=WITHHELD, signature=score.signature)
