"""Plots a profile of a decode step: `python -m benchmarks.decode_profile`.

The engine runs in this process with one thread, every organ's experts in a process of their own. The picture shows one
step, that of median length, as it happened: what the engine's thread did, and when each expert process's kernel was at
work. The table has the medians over all steps. Writes `benchmarks/results/decode_profile_<dtype>.md` and `.png`. The
machine should be idle.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from benchmarks.checkpoints import DTYPES, BenchCheckpoint, add_options, bench_checkpoint
from benchmarks.drawing import check_drawing, load_pyplot
from benchmarks.expert_processes import Busy
from benchmarks.machine import describe
from benchmarks.measured_engine import MeasuredEngine, become_router_process, measured_engine
from benchmarks.step_timeline import (
    COMMIT,
    HEAD,
    KERNEL,
    LAYER,
    LAYER_PARTS,
    SAMPLING,
    SCHEDULING,
    Step,
    timeline_of,
)
from benchmarks.workload import random_workload
from echovlm_ray.checkpoint.layout import ORGANS
from echovlm_ray.model.packing import PackedLinearLayer

RESULTS = Path(__file__).resolve().parent / "results"
BATCHES = (1, 8)
PROMPT_TOKENS = 128
DELIVERY, OTHER_INSIDE, OTHER_OUTSIDE = "delivery", "other, in layers", "other, outside"
# Every moment of a step belongs to one of these.
ACTIVITIES = (*LAYER_PARTS, OTHER_INSIDE, HEAD, SAMPLING, DELIVERY, SCHEDULING, OTHER_OUTSIDE)
# How often the products are timed.
PASSES = 21


@dataclass(frozen=True, slots=True)
class Profile:
    """The profile of one case.

    Attributes:
        seconds: median of a step.
        activities: median seconds of a step by activity of the engine's thread.
        products_s: median seconds of the backbone's packed products by themselves, one after the other, while nothing
            else runs: what no step of one thread can do without, for each reads all of its weights.
        busy_s: median seconds of a step in which at least one expert process computed.
        kernel_s: median seconds of a step that all of them computed, added up.
        step: the one that is drawn.
        busy: organ → when its kernel was at work in that step.
    """

    batch: int
    organs: int
    steps: int
    seconds: float
    activities: Mapping[str, float]
    products_s: float
    busy_s: float
    kernel_s: float
    step: Step
    busy: Mapping[str, list[Busy]]

    @property
    def label(self) -> str:
        """The case in words."""
        return f"batch {self.batch}" + (f", {self.organs} organs" if self.organs > 1 else "")


def activities_of(step: Step) -> dict[str, float]:
    """Seconds of a step by activity; they add up to the step."""
    totals = step.totals()
    seconds = {part: totals.get(part, 0.0) for part in (*LAYER_PARTS, HEAD, SAMPLING, SCHEDULING)}
    seconds[OTHER_INSIDE] = totals[LAYER] - sum(seconds[part] for part in LAYER_PARTS)
    seconds[DELIVERY] = totals[COMMIT] - seconds[SAMPLING]
    seconds[OTHER_OUTSIDE] = step.seconds - sum(seconds.values())
    return seconds


@torch.inference_mode()
def products_seconds(model: nn.Module, rows: int) -> float:
    """Median seconds of all packed products of a model, each with so many rows."""
    linears = [layer.packed for layer in model.modules() if isinstance(layer, PackedLinearLayer)]
    inputs = {linear.in_features: torch.ones(rows, linear.in_features, dtype=linear.dtype) for linear in linears}
    seconds = []
    for _ in range(PASSES):
        began = time.perf_counter()
        for linear in linears:
            linear(inputs[linear.in_features])
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def during(step: Step, busy: Sequence[Busy]) -> list[Busy]:
    """What of the busy times lies in a step."""
    return [(max(began, step.start), min(ended, step.end)) for began, ended in busy if step.start < ended <= step.end]


def union_seconds(spans: Sequence[Busy]) -> float:
    """Seconds that lie in at least one of the spans."""
    covered, until = 0.0, float("-inf")
    for began, ended in sorted(spans):
        covered += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return covered


def profile(measured: MeasuredEngine, checkpoint: BenchCheckpoint, batch: int, organs: int, new_tokens: int) -> Profile:
    """Runs one case, after a run that does not count."""
    for run in ("warm-up", "profiled"):
        workload = random_workload(
            batch,
            prompt_tokens=PROMPT_TOKENS,
            new_tokens=new_tokens if run == "profiled" else 4,
            vocab_size=checkpoint.config["vocab_size"],
            organs=checkpoint.organs[:organs],
            seed=f"{run} {batch} {organs}",
        )
        for process in measured.processes:
            process.busy()
        with timeline_of(measured.engine) as timeline:
            measured.run(workload)
            steps = [step for step in timeline.steps() if step.rows == (1,) * batch]
    busy = {process.organ: process.busy() for process in measured.processes}
    seen = [activities_of(step) for step in steps]
    kernels = [[span for spans in busy.values() for span in during(step, spans)] for step in steps]
    median_s = statistics.median(step.seconds for step in steps)
    drawn = min(steps, key=lambda step: abs(step.seconds - median_s))
    return Profile(
        batch=batch,
        organs=organs,
        steps=len(steps),
        seconds=median_s,
        activities={name: statistics.median(seconds[name] for seconds in seen) for name in ACTIVITIES},
        products_s=products_seconds(measured.runner.model, batch),
        busy_s=statistics.median(union_seconds(spans) for spans in kernels),
        kernel_s=statistics.median(sum(ended - began for began, ended in spans) for spans in kernels),
        step=drawn,
        busy={organ: spans for organ, every in busy.items() if (spans := during(drawn, every))},
    )


def markdown(profiles: Sequence[Profile], checkpoint: BenchCheckpoint) -> str:
    """The result file's text."""
    labels = [f"{profile.label}, ms | %" for profile in profiles]
    lines = [
        "# Where the time of a decode step goes",
        "",
        describe(),
        f"Configuration `config_{checkpoint.name}.json`, {checkpoint.dtype}, {PROMPT_TOKENS} prompt tokens, experts in "
        "processes of their own, one thread a process; `python -m benchmarks.decode_profile`. Medians over steps of "
        "what the engine's thread does; each is measured on its own, so they add up to a step only nearly.",
        "",
        f"![One decode step](decode_profile_{checkpoint.dtype}.png)",
        "",
        f"| activity | {' | '.join(labels)} |",
        "| --- " + "| ---: " * (2 * len(profiles)) + "|",
    ]

    def row(name: str, values: Sequence[tuple[float, Profile]]) -> str:
        cells = [f"{1e3 * value:.2f} | {100 * value / profile.seconds:.0f}" for value, profile in values]
        return f"| {name} | {' | '.join(cells)} |"

    lines += [row(name, [(profile.activities[name], profile) for profile in profiles]) for name in ACTIVITIES]
    lines += [
        row("**a step**", [(profile.seconds, profile) for profile in profiles]),
        row(
            "the packed products by themselves, head included", [(profile.products_s, profile) for profile in profiles]
        ),
        row("an expert process computes", [(profile.busy_s, profile) for profile in profiles]),
        row("all of them, added up", [(profile.kernel_s, profile) for profile in profiles]),
    ]
    return "\n".join(lines) + "\n"


def plot(profiles: Sequence[Profile], title: str, path: Path) -> None:
    """One step of every case: a lane for the engine's thread, and one for each expert process that it used."""
    from matplotlib.patches import Patch

    heights = [2 + 0.4 * len(profile.busy) for profile in profiles]
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(
        len(profiles), 1, figsize=(18, 2.0 + sum(heights)), layout="constrained", squeeze=False, height_ratios=heights
    )
    shown = (*LAYER_PARTS, HEAD, SAMPLING, DELIVERY, SCHEDULING, OTHER_INSIDE)
    palette = pyplot.get_cmap("tab20").colors
    colors = dict(zip(shown, palette, strict=False)) | {OTHER_INSIDE: "#d0d0d0"}
    named = {LAYER: OTHER_INSIDE, COMMIT: DELIVERY}
    for profile, (axis,) in zip(profiles, axes, strict=True):
        origin = profile.step.start
        lanes = ["engine thread", *(f"experts of {organ}" for organ in profile.busy)]
        # Those that contain others first, so that the others lie on top.
        for span in sorted(profile.step.spans, key=lambda span: -span.seconds):
            if span.name != KERNEL:
                color = colors[named.get(span.name, span.name)]
                axis.barh(0, 1e3 * span.seconds, left=1e3 * (span.start - origin), color=color, height=0.8)
        for lane, spans in enumerate(profile.busy.values(), start=1):
            for began, ended in spans:
                axis.barh(lane, 1e3 * (ended - began), left=1e3 * (began - origin), color="#8b0000", height=0.8)
        axis.set_yticks(range(len(lanes)), lanes)
        axis.invert_yaxis()
        axis.set_xlim(0, 1e3 * profile.step.seconds)
        axis.set_title(f"{profile.label}: one step of {1e3 * profile.step.seconds:.1f} ms", loc="left")
    axes[-1][0].set_xlabel("ms")
    legend = [Patch(color=colors[name], label=name) for name in shown]
    legend += [Patch(facecolor="white", edgecolor="black", label=OTHER_OUTSIDE), Patch(color="#8b0000", label=KERNEL)]
    figure.legend(handles=legend, loc="outside lower center", ncols=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--config", default="4_experts", help="config_<name>.json (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="(default: %(default)s)")
    parser.add_argument(
        "--organs", type=int, default=len(ORGANS), help="the most that sequences are divided among (default: all)"
    )
    parser.add_argument("--new-tokens", type=int, default=48, help="of every sequence (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result (default: %(default)s)")
    options = parser.parse_args()
    check_drawing()
    become_router_process("benchmarks.decode_profile")
    console = Console()
    checkpoint = bench_checkpoint(options.config, options.dtype, configs=options.configs, folder=options.checkpoints)
    profiles = []
    organs = checkpoint.organs[: options.organs]
    cases = [(batch, spread) for batch in BATCHES for spread in dict.fromkeys((1, min(batch, len(organs)) or 1))]
    with Progress(console=console) as progress, measured_engine(checkpoint.split, "remote", organs=organs) as measured:
        for batch, spread in progress.track(cases, description="profiling"):
            profiles.append(profile(measured, checkpoint, batch, spread, options.new_tokens))
    text = markdown(profiles, checkpoint)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"decode_profile_{options.dtype}.md").write_text(text)
    title = f"config_{options.config}.json, {options.dtype}: one decode step"
    plot(profiles, title, options.output / f"decode_profile_{options.dtype}.png")
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
