"""A self-contained HTML page: scores, baselines, example images.

Everything that a model or a dataset wrote is escaped by the template engine, what would change the direction of text or
show nothing is seen as its escape, and the page itself forbids scripts and any connection.
"""

import base64
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from echovlm_ray.evaluation.result import EvaluationResult, GroupScores, Score
from experts.bundles.invisible import visible

_TITLES = {
    "language": "By language",
    "task": "By task",
    "organ": "By organ",
    "class": "By class",
}
# What the narrower tables show of the scores of words.
_SHORT = ("BLEU-1", "BLEU-4", "ROUGE-L")


def report_page(result: EvaluationResult, figure: Path | None = None) -> str:
    """The page.

    Args:
        result: of an evaluation.
        figure: a PNG to put into it.
    """
    loader = PackageLoader("echovlm_ray.evaluation", ".")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, loader=loader, finalize=_shown
    )
    everything: list[tuple[str, GroupScores]] = [(found.variant, found) for found in result.groups if found.by == "all"]
    tables = [("The model and its baselines", everything, *_columns([found for _, found in everything]))]
    for by, title in _TITLES.items():
        groups = [(found.name, found) for found in result.groups if found.by == by and found.variant == "model"]
        if groups:
            substance, words = _columns([found for _, found in groups])
            short = [name for name in words if name.startswith(_SHORT)]
            tables.append((title, groups, substance, short if by != "class" else []))
    model = result.group("model")
    assert model is not None
    scores = {**model.substance, **model.words}
    return environment.get_template("page.html").render(
        result=result,
        figure="" if figure is None else base64.b64encode(figure.read_bytes()).decode(),
        tables=tables,
        reasons=[(name, found.error) for name, found in scores.items() if found.error],
        signatures=[(name, found.signature) for name, found in scores.items() if found.signature],
        cell=_cell,
        interval=_interval,
    )


def _shown(value: object) -> object:
    return visible(value) if isinstance(value, str) else value


def _columns(groups: list[GroupScores]) -> tuple[list[str], list[str]]:
    """The metrics that at least one group has a value of."""
    substance = {name: None for found in groups for name, value in found.substance.items() if value.value is not None}
    words = {name: None for found in groups for name, value in found.words.items() if value.value is not None}
    return list(substance), list(words)


def _cell(score: Score | None, digits: int) -> str:
    return "–" if score is None or score.value is None else f"{score.value:.{digits}f}"


def _interval(score: Score | None, digits: int) -> str:
    if score is None or score.low is None or score.high is None:
        return ""
    return f"{score.low:.{digits}f} to {score.high:.{digits}f}"
