"""Plots the scores of the model and its baselines as a PNG."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from echovlm_ray.evaluation.baselines import VARIANTS
from echovlm_ray.evaluation.result import EvaluationResult, GroupScores

_COLOURS = dict(zip(VARIANTS, ("#0b5cad", "#8c959f", "#bf8700", "#cf222e"), strict=True))


def draw_scores(result: EvaluationResult, path: Path) -> bool:
    """Plots the share of right answers, with BLEU-1 and ROUGE-L where they are shown.

    Returns:
        whether there was anything to draw.
    """
    groups = [found for variant in VARIANTS if (found := result.group(variant)) is not None]
    scores = [_scores(group) for group in groups]
    names = list(dict.fromkeys(name for values in scores for name in values))
    if not names:
        return False
    figure = Figure(figsize=(2.5 + 1.1 * len(names), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(groups)
    for number, (group, values) in enumerate(zip(groups, scores, strict=True)):
        places = [names.index(name) + (number - (len(groups) - 1) / 2) * width for name in values]
        heights = [value for value, _, _ in values.values()]
        errors = [
            [value - low for value, low, _ in values.values()],
            [high - value for value, _, high in values.values()],
        ]
        colour = _COLOURS[group.variant]
        axes.bar(places, heights, width * 0.92, color=colour, label=group.variant)
        axes.errorbar(places, heights, yerr=errors, fmt="none", ecolor="#1b1f24", elinewidth=0.8)
    axes.set_xticks(range(len(names)), [name.replace(" (", "\n(") for name in names], rotation=30, ha="right")
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("score (of words: ÷ 100)")
    axes.grid(axis="y", linewidth=0.4)
    axes.legend(fontsize="small", ncols=len(groups), loc="upper center", bbox_to_anchor=(0.5, 1.15))
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return True


def _scores(group: GroupScores) -> dict[str, tuple[float, float, float]]:
    """Name → value and interval from 0 to 1, of what has a value."""
    words = {name: score for name, score in group.words.items() if name.startswith(("BLEU-1", "ROUGE-L"))}
    found = {}
    for scores, scale in ((group.substance, 1.0), (words, 0.01)):
        for name, score in scores.items():
            if score.value is not None:
                value = score.value * scale
                low = value if score.low is None else min(score.low * scale, value)
                high = value if score.high is None else max(score.high * scale, value)
                found[name] = value, low, high
    return found
