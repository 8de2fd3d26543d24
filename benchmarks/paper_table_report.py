"""What the paper's comparison found, as a page, a picture and sentences that follow from the numbers."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks.drawing import new_figure, save_figure
from benchmarks.machine import describe
from benchmarks.measure_table import table_head
from benchmarks.paper_table_data import HELD_OUT_SEED, TRAINING_SEED, Scale
from benchmarks.paper_table_scores import ATTRIBUTES, BLEU, METRICS, ROUGE, SETTINGS, Comparison, Gain, Scores, Value
from benchmarks.paper_table_training import Cell
from benchmarks.paper_table_variants import BASELINE, MOE, VARIANTS
from echovlm_ray.evaluation.items import Item

# arXiv 2509.14977: report generation, EchoVLM against its dense backbone, in points; first and second version.
PAPER_GAINS = {BLEU: (10.15, 7.58), ROUGE: (4.77, 3.45)}
TITLES = {variant.name: variant.title for variant in VARIANTS}
SHOWN = (BLEU, ROUGE, ATTRIBUTES)


def page(scores: Scores, cells: Sequence[Cell], scale: Scale, items: Sequence[Item]) -> str:
    """The result as Markdown.

    Args:
        scores: of the answers.
        cells: what they are of.
        scale: how large everything was.
        items: the held-out records.
    """
    seeds = sorted({cell.seed for cell in cells})
    lines = [
        "# The paper's comparison in miniature",
        "",
        "`python -m benchmarks.paper_table`: is EchoVLM's mixture of experts worth more than its dense backbone, and "
        "what are its parts worth, when everything else is the same?",
        "",
        describe(),
        "",
        *_setting(scale, seeds, _gate_right(cells, scale, items)),
        "",
        "## What came out",
        "",
        *_conclusion(scores),
        "",
        "![scores of all variants](paper_table.png)",
        "",
        "## Scores on the held-out reports",
        "",
        "All seeds together; in brackets the bootstrap's interval of 95 % over records.",
        "",
        *_score_table(scores),
        "",
        "The same, each seed by itself:",
        "",
        *_seed_table(scores),
        "",
        "## Differences",
        "",
        "Paired by record and seed: difference, the paired bootstrap's interval of 95 % over records, the p-value of "
        "approximate randomisation, and in the last column BLEU-1 of each seed by itself. P-values are of one test "
        f"each, not corrected for how many there are ({len(scores.comparisons) * len(SHOWN)} in this table).",
        "",
        *_difference_table(scores.comparisons),
        "",
        "## What each variant costs",
        "",
        *_cost_table(cells),
    ]
    return "\n".join(lines) + "\n"


def _gate_right(cells: Sequence[Cell], scale: Scale, items: Sequence[Item]) -> float:
    """How often the organ gate chose the right organ, as a share."""
    chosen = [
        scale.organs[organ] == item.organ for cell in cells for organ, item in zip(cell.organs, items, strict=True)
    ]
    return sum(chosen) / len(chosen)


def _setting(scale: Scale, seeds: Sequence[int], gate_right: float) -> list[str]:
    return [
        f"- **Data**: {scale.pictures} phantoms of {', '.join(scale.organs)} (seed {TRAINING_SEED}, all their "
        f"classes) with English reports to learn from, {scale.held_out} of seed {HELD_OUT_SEED} to be asked about. "
        "Phantoms are synthetic: nothing here is about patients.",
        f"- **Same for all variants**: {scale.layers} layers, {scale.steps} steps of {scale.batch} examples, the same "
        f"examples in the same order, AdamW with a cosine from {scale.learning_rate:g}, words that the picture decides "
        f"weighted × {scale.emphasis:g}, load balancing {scale.balancing:g} where there are experts. All start from "
        "random weights.",
        f"- **Vision tower**: one was warmed up by finding heads ({scale.look_steps} steps of 32) before "
        "any language model saw it; it is frozen, and all variants and seeds have it. Without a warm-up a language "
        "model of this size learns the wording and ignores the picture.",
        f"- **Seeds**: {', '.join(map(str, seeds))}: other random weights of the language model and another order "
        "of the examples. Phantoms and vision tower are the same, so what those add to the spread is not seen here.",
        "- **Organ-gated**: in training the organ is the true one, in the answers the one that the organ gate chose by "
        f"prototypes; it was right for {100 * gate_right:.1f} % of the held-out pictures.",
        "- BLEU-1 and ROUGE-1 are from 0 to 100, against all wordings of the truth; attribute F1 is from 0 to 1. "
        f"{SETTINGS.draws} resamples.",
    ]


def _conclusion(scores: Scores) -> list[str]:
    found = {(each.variant, each.against): each.gains for each in scores.comparisons}
    lines = []
    if gains := found.get((MOE, BASELINE)):
        paper = "; ".join(
            f"{_name(metric)} {_signed(gains[metric].value, 2)} points (the paper: {_signed(first, 2)} in its first "
            f"version, {_signed(second, 2)} in its second)"
            for metric, (first, second) in PAPER_GAINS.items()
        )
        lines += [
            f"**The MoE against the dense baseline: {paper}; attribute F1 {_signed(gains[ATTRIBUTES].value, 3)}.** "
            f"Verdicts: {_verdicts(gains)}.",
            "",
            *_ceiling(scores),
        ]
    tests = [each.gains[metric].p_value for each in scores.comparisons for metric in SHOWN]
    lines += [
        "A verdict is “better” or “worse” where the interval over records leaves out zero and all seeds agree.",
        *_corrected(tests),
        "",
    ]
    for (variant, against), gains in found.items():
        if (variant, against) != (MOE, BASELINE):
            lines.append(f"- {TITLES[variant]}, against {TITLES[against]}: {_verdicts(gains)}.")
    lines += [
        "",
        "What this cannot say: models of a few million parameters, trained from random weights on synthetic pictures "
        "whose reports have few wordings, are not a pretrained model of 10 billion parameters on 208,941 cases. What a "
        "picture shows comes from the frozen vision tower, which all variants share; they differ only in what makes "
        "words of it, and three organs in one language may be too few for experts to divide among themselves. A few "
        "seeds show the spread of training only roughly.",
    ]
    return lines


def _ceiling(scores: Scores) -> list[str]:
    """Says so where the paper's gain would not fit above the baseline."""
    over = [
        f"{_name(metric)} of the baseline is {_plain(baseline, metric)}"
        for metric, gains in PAPER_GAINS.items()
        if (baseline := scores.values[BASELINE][metric].value) + min(gains) > 100
    ]
    if not over:
        return []
    return [
        f"{' and '.join(over)} of 100 here, so gains as large as the paper's cannot appear: its reports are harder. "
        "Give fewer --steps for a comparison of models that have learnt less.",
        "",
    ]


def _corrected(p_values: Sequence[float]) -> list[str]:
    if not p_values:
        return []
    limit = 0.05 / len(p_values)
    count = sum(p_value < limit for p_value in p_values)
    return [
        f"Of {len(p_values)} tests {count} stay below 0.05 when corrected for their number "
        f"(Bonferroni: p < {limit:.4f})."
    ]


def _verdicts(gains: dict[str, Gain]) -> str:
    return ", ".join(
        f"{_name(metric)} {_signed_of(gains[metric], metric)} ({gains[metric].verdict})" for metric in SHOWN
    )


def _score_table(scores: Scores) -> list[str]:
    lines = table_head(f"| variant | {' | '.join(map(_name, METRICS))} |")
    for name, values in scores.values.items():
        lines.append(f"| {TITLES.get(name, name)} | {' | '.join(_value(values[each], each) for each in METRICS)} |")
    return lines


def _seed_table(scores: Scores) -> list[str]:
    lines = table_head(f"| variant | {' | '.join(map(_name, SHOWN))} |")
    for name, values in scores.values.items():
        if name in TITLES:
            cells = [", ".join(_plain(seed, metric) for seed in values[metric].seeds) for metric in SHOWN]
            lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    return lines


def _difference_table(comparisons: Sequence[Comparison]) -> list[str]:
    lines = table_head(f"| variant | against | {' | '.join(map(_name, SHOWN))} | BLEU-1, each seed |")
    for each in comparisons:
        cells = []
        for metric in SHOWN:
            gain = each.gains[metric]
            bounds = f"{_signed_text(gain.low, metric)} to {_signed_text(gain.high, metric)}"
            cells.append(f"{_signed_of(gain, metric)} [{bounds}], p {gain.p_value:.4f}")
        seeds = ", ".join(_signed(seed, 1) for seed in each.gains[BLEU].seeds)
        lines.append(f"| {TITLES[each.variant]} | {TITLES[each.against]} | {' | '.join(cells)} | {seeds} |")
    return lines


def _cost_table(cells: Sequence[Cell]) -> list[str]:
    lines = table_head(
        "| variant | parameters, million | of these a token meets | s a step | loss on held-out reports "
        "| token accuracy | dead experts |"
    )
    for variant in VARIANTS:
        own = [cell for cell in cells if cell.variant == variant.name]
        if own:
            lines.append(
                f"| {variant.title} | {own[0].total / 1e6:.3f} | {own[0].active / 1e6:.3f} | "
                f"{min(cell.step_seconds for cell in own):.3f} | {mean(cell.answer_loss for cell in own):.4f} | "
                f"{mean(cell.token_accuracy for cell in own):.4f} | {mean(cell.dead_experts for cell in own):.1f} |"
            )
    return [
        *lines,
        "",
        "A step is processor time, the median of a run, of the fastest seed; it goes forwards and backwards "
        "through the language model alone. The vision tower is counted among the parameters.",
    ]


def _name(metric: str) -> str:
    return metric.removesuffix(" (words)")


def _digits(metric: str) -> int:
    return 1 if metric in (BLEU, ROUGE) else 3


def _plain(number: float, metric: str) -> str:
    return f"{number:.{_digits(metric)}f}"


def _value(value: Value, metric: str) -> str:
    return f"{_plain(value.value, metric)} [{_plain(value.low, metric)}, {_plain(value.high, metric)}]"


def _signed(number: float, digits: int) -> str:
    return f"{number:+.{digits}f}"


def _signed_text(number: float, metric: str) -> str:
    return _signed(number, _digits(metric))


def _signed_of(gain: Gain, metric: str) -> str:
    return _signed_text(gain.value, metric)


def draw(scores: Scores, path: Path) -> None:
    """The three scores of all variants: a point with its interval, the seeds, and a line where the baseline is."""
    names = [name for name in scores.values if name in TITLES]
    figure = new_figure(len(SHOWN), figsize=(14, 0.6 * len(names) + 1.6), sharey=True)
    axes = figure.axes
    places = range(len(names))
    for axis, metric in zip(axes, SHOWN, strict=True):
        values = [scores.values[name][metric] for name in names]
        centre = [value.value for value in values]
        errors = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
        axis.errorbar(centre, places, xerr=errors, fmt="o", color="C0", capsize=3, label="all seeds, 95 % over records")
        for place, value in zip(places, values, strict=True):
            label = "each seed" if place == 0 else None
            axis.scatter(value.seeds, [place + 0.22] * len(value.seeds), s=14, color="C1", zorder=3, label=label)
        if BASELINE in names:
            baseline = scores.values[BASELINE][metric].value
            axis.axvline(baseline, color="gray", linestyle=":", label="the dense baseline")
        axis.set_xlabel(_name(metric))
    axes[0].set_yticks(list(places), [TITLES[name] for name in names])
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    save_figure(figure, path)
