"""The scaling model's predictions as Markdown, as a picture and as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.drawing import new_figure, save_figure
from benchmarks.scaling_formulas import Schedule
from benchmarks.scaling_predictions import (
    CAPTURED,
    MEASURED,
    Assumptions,
    Check,
    Line,
    hidden_latency,
    latency_at_which_two_pay,
)
from benchmarks.scaling_system import Limit, Mode, Sizes


def markdown(
    sizes: Sizes,
    lines: Sequence[Line],
    checks: Sequence[Check],
    assumptions: Assumptions,
    mode: Mode,
    context: int,
    machine: str,
) -> str:
    """The result file's text."""
    billions = [f"{count / 1e9:.2f}" for count in (sizes.total, sizes.routed, sizes.vision)]
    text = [
        "# Predicted decode throughput of the released model",
        "",
        f"{billions[0]} B parameters, of them routed experts {billions[1]} B and vision {billions[2]} B; bfloat16; "
        f"experts in {mode} mode; {context} tokens of context a request. Nothing here was measured on "
        "a GPU: the formulas are in [docs/scaling.md](../../docs/scaling.md), and this is what they are given.",
        "",
        "| assumption | value |",
        "| --- | ---: |",
        *(f"| {name} | {value:g} |" for name, value in asdict(assumptions).items()),
        "",
        "Software costs are those that `python -m benchmarks.host_costs` measured: " + machine,
    ]
    titles = {
        MEASURED: "With the software's measured costs",
        CAPTURED: f"With {assumptions.captured_layer_us:g} µs of software a layer, as CUDA graphs would have it",
    }
    for software, title in titles.items():
        text += [
            "",
            f"## {title}",
            "",
            "| GPUs | requests at once | routers + experts + vision | step, ms | tokens/s | a request | limit |",
            "| ---: | ---: | --- | ---: | ---: | ---: | --- |",
        ]
        text += [_line(line) for line in lines if line.software == software]
    text += ["", "## When two micro-batches pay", ""]
    text += _overlap(lines, context)
    text += [
        "",
        "## The formulas against measurements",
        "",
        "The same formulas, given the rates of products of another size and the software's cost in small models, "
        "against what the engine really did with the measured configuration. No figure of that configuration goes in.",
        "",
        "| dtype | experts | organs | batch | measured, tokens/s | predicted | error | limit |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
        *(
            f"| {found.dtype} | {found.placement} | {found.organs} | {found.batch} | {found.measured:.1f} | "
            f"{found.predicted.tokens_per_s:.1f} | {100 * found.error:+.0f}% | {found.predicted.limit} |"
            for found in checks
        ),
        "",
        _errors("All", checks),
        _errors("Without remote experts of several organs", [found for found in checks if not found.is_crowded]),
        "",
        "Where the experts of several organs are remote, the machine has more processes than cores: they take the "
        "router's core from it as well, which the formulas do not know.",
    ]
    return "\n".join(text) + "\n"


def _errors(name: str, checks: Sequence[Check]) -> str:
    errors = [100 * abs(found.error) for found in checks]
    return f"- {name}: mean error {sum(errors) / len(errors):.0f}%, largest {max(errors):.0f}%."


def _line(line: Line) -> str:
    found = line.prediction
    if found is None:
        return f"| {line.gpus} | {line.requests} | | | | | the cache does not fit |"
    plan = found.system.plan
    where = f"{plan.routers} + {plan.expert_devices} + {plan.vision_devices}" if plan.expert_devices else "all on one"
    where += ", two micro-batches" if found.schedule is not Schedule.ONE else ""
    share = found.costs[found.limit] / found.step_s
    return (
        f"| {line.gpus} | {line.requests} | {where} | {1e3 * found.step_s:.1f} | {found.tokens_per_s:,.0f} | "
        f"{found.tokens_per_s / line.requests:.0f} | {found.limit} ({100 * share:.0f}%) |"
    )


def _overlap(lines: Sequence[Line], context: int) -> Iterator[str]:
    yield (
        "Up to the first latency (one way) the way to the experts and back costs nothing, because dense MLP and shared "
        "expert take longer. From the others on, two micro-batches are faster than one: as the engine computes them, "
        "both begun and then both finished in every layer; and if one half went on to the next layer while the other "
        "half's experts are away, which it does not do. Below they lose, because every weight is read twice."
    )
    yield from ("", "| software | GPUs | requests | hidden up to, µs | two pay from, µs | across layers from, µs |")
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for line in lines:
        found = line.prediction
        if found is None or found.system.plan.expert_devices == 0 or found.requests < 2 * found.system.plan.routers:
            continue
        cells = [f"{1e6 * hidden_latency(found.system, found.requests, context):.0f}"]
        for schedule in (Schedule.LAYER_BY_LAYER, Schedule.ACROSS_LAYERS):
            pays = latency_at_which_two_pay(found.system, found.requests, context, schedule)
            cells.append("never" if pays is None else f"{1e6 * pays:.0f}")
        yield f"| {line.software} | {line.gpus} | {line.requests} | {' | '.join(cells)} |"


def plot(lines: Sequence[Line], path: Path) -> None:
    """Tokens/s against requests for each number of GPUs, and what the steps are spent on."""
    figure = new_figure(2, figsize=(15, 6))
    throughput, spent = figure.axes
    for gpus in dict.fromkeys(line.gpus for line in lines):
        color = None
        for software, style in ((MEASURED, "-"), (CAPTURED, "--")):
            own = [
                (line.requests, line.prediction.tokens_per_s)
                for line in lines
                if (line.gpus, line.software) == (gpus, software) and line.prediction is not None
            ]
            label = f"{gpus} GPU{'s' if gpus > 1 else ''}, software {software}"
            (drawn,) = throughput.plot(*zip(*own, strict=True), style, marker="o", label=label, color=color)
            color = drawn.get_color()
    throughput.set(xscale="log", yscale="log", xlabel="requests at once", ylabel="decode tokens/s, predicted")
    throughput.legend()
    shown = [(line, line.prediction) for line in lines if line.prediction is not None]
    labels = [f"{line.gpus} GPU, {line.requests} requests, {line.software}" for line, _ in shown]
    left = [0.0] * len(shown)
    for limit in Limit:
        shares = [100 * found.costs.get(limit, 0.0) / found.step_s for _, found in shown]
        spent.barh(labels, shares, left=left, label=limit.value)
        left = [begin + share for begin, share in zip(left, shares, strict=True)]
    spent.invert_yaxis()
    spent.set_xlabel("% of a step")
    spent.tick_params(axis="y", labelsize="x-small")
    spent.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4, fontsize="small")
    save_figure(figure, path)


def to_json(lines: Sequence[Line], checks: Sequence[Check], assumptions: Assumptions) -> dict[str, Any]:
    """All figures as plain values."""
    return {
        "assumptions": asdict(assumptions),
        "predictions": [
            {
                "software": line.software,
                "gpus": line.gpus,
                "requests": line.requests,
                "plan": asdict(line.prediction.system.plan),
                "schedule": line.prediction.schedule,
                "step_s": line.prediction.step_s,
                "tokens_per_s": line.prediction.tokens_per_s,
                "limit": line.prediction.limit,
                "costs_s": line.prediction.costs,
            }
            for line in lines
            if line.prediction is not None
        ],
        "check": [
            {
                "dtype": found.dtype,
                "placement": found.placement,
                "organs": found.organs,
                "batch": found.batch,
                "measured_tokens_per_s": found.measured,
                "predicted_tokens_per_s": found.predicted.tokens_per_s,
                "error": found.error,
            }
            for found in checks
        ],
    }
