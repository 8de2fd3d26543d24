"""Tables of `echoray eval`: scores and differences. Text metrics are never shown without clinical ones."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from echovlm_ray.cli.tables import Listing
from echovlm_ray.cli.terminal import MAX_CELL, line, name_of

if TYPE_CHECKING:
    from echovlm_ray.evaluation.comparing import Comparison
    from echovlm_ray.evaluation.result import EvaluationResult, GroupScores, Score


def print_result(result: "EvaluationResult", console: Console) -> None:
    """Prints the model with its baselines, then its groups, with one row per metric."""
    everything = [(found.variant, found) for found in result.groups if found.by == "all"]
    shown = ("BLEU-1", "BLEU-4", "ROUGE-L", "METEOR")
    _table("the model and its baselines", everything, console, words_shown=shown, with_intervals=True)
    for by in ("language", "task", "organ"):
        groups = [(found.name, found) for found in result.groups if found.by == by and found.variant == "model"]
        if len(groups) > 1:
            _table(f"the model by {by}", groups, console, words_shown=("BLEU-1",))
    _classes([found for found in result.groups if found.by == "class" and found.variant == "model"], console)
    model = everything[0][1]
    for name, score in {**model.substance, **model.words}.items():
        if score.error:
            console.print(line(f"{name} is not computed: {score.error}", MAX_CELL), style="dim")
    for notice in result.notices:
        console.print(f"note: {line(notice)}", style="yellow")


def _table(
    title: str,
    groups: "Sequence[tuple[str, GroupScores]]",
    console: Console,
    *,
    words_shown: tuple[str, ...],
    with_intervals: bool = False,
) -> None:
    table = Listing("", *(name_of(label) for label, _ in groups), title=title)
    table.add_row("records", *(str(group.records) for _, group in groups))
    for name in _names([group.substance for _, group in groups]):
        table.add_row(name_of(name), *(_cell(group.substance.get(name), 3, with_intervals) for _, group in groups))
    for name in _names([group.words for _, group in groups]):
        if name.startswith(words_shown):
            table.add_row(name_of(name), *(_cell(group.words.get(name), 1, with_intervals) for _, group in groups))
    console.print(table)


def _classes(groups: "Sequence[GroupScores]", console: Console) -> None:
    names = [
        name for name in ("attribute F1", "diagnosis accuracy") if any(name in group.substance for group in groups)
    ]
    if not names:
        return
    table = Listing("class", "records", *names, title="the model by class", right=["records"])
    for group in groups:
        cells = [_cell(group.substance.get(name), 3, True) for name in names]
        table.add_row(name_of(group.name), str(group.records), *cells)
    console.print(table)


def _names(scores: "Sequence[Mapping[str, Score]]") -> list[str]:
    """The metrics with a value in at least one group."""
    return list(dict.fromkeys(name for found in scores for name, score in found.items() if score.value is not None))


def _cell(score: "Score | None", digits: int, with_interval: bool) -> str | Text:
    if score is None or score.value is None:
        return "-"
    text = f"{score.value:.{digits}f}"
    if with_interval and score.low is not None and score.high is not None:
        return Text.assemble(text, (f" ({score.low:.{digits}f}-{score.high:.{digits}f})", "dim"))
    return text


def print_comparison(comparison: "Comparison", console: Console) -> None:
    """Prints each metric of both, with the difference, its interval and the p-value."""
    first, second = comparison.first, comparison.second
    console.print(
        f"{name_of(f'{first.name} {first.version}')} (set {line(first.expert_set_id[:12])}) against "
        f"{name_of(f'{second.name} {second.version}')} (set {line(second.expert_set_id[:12])})"
    )
    groups = dict.fromkeys((metric.by, metric.group) for metric in comparison.metrics)
    for by, name in groups:
        table = Listing(
            "metric", "records", "first", "second", "difference", "95 %", "p", title=f"{by} {name_of(name)}"
        )
        for metric in comparison.metrics:
            if (metric.by, metric.group) != (by, name):
                continue
            digits = 1 if metric.words else 3
            if metric.difference is None or metric.first is None or metric.second is None or metric.p_value is None:
                table.add_row(name_of(metric.name), str(metric.records), "-", "-", "-", "-", "-")
                continue
            bounds = (
                ""
                if metric.low is None or metric.high is None
                else f"{metric.low:+.{digits}f} to {metric.high:+.{digits}f}"
            )
            values = [f"{metric.first:.{digits}f}", f"{metric.second:.{digits}f}", f"{metric.difference:+.{digits}f}"]
            table.add_row(name_of(metric.name), str(metric.records), *values, bounds, f"{metric.p_value:.4f}")
        console.print(table)
    for notice in comparison.notices:
        console.print(f"note: {line(notice)}", style="yellow")
    console.print("p: of one test each, not corrected for how many there are.", style="dim")
