"""The expert kernels on a CPU, one thread, against the Python loop over experts: `python -m benchmarks.kernels_cpu`.

Writes `benchmarks/results/kernels_cpu.md`. The machine should be idle. In every repetition all kernels compute the same
call one after the other, so what disturbs one disturbs all; a repetition uses another layer's weights than the one
before, as decoding does, so that they come from memory and not from the processor's cache.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.machine import describe
from experts.kernels.base import ExpertWeights, PreparedExperts, kernel_in_use
from experts.kernels.registry import get_kernel

RESULT = Path(__file__).resolve().parent / "results" / "kernels_cpu.md"
BASELINE = "reference"
KERNELS = (BASELINE, "torch_grouped", "cpu_packed")
TOKENS = (1, 8, 32, 64, 128, 512)
TOP_K = 2
# How many times as fast as the loop cpu_packed must be.
TARGETS = {
    torch.float32: {1: 1.8, 8: 2.0, 32: 2.0, 64: 2.0, 128: 2.0, 512: 2.0},
    torch.bfloat16: {1: 1.8, 8: 1.8, 64: 1.2, 512: 1.0},
}
MEMORY_TARGET = 1.1
# More than a processor's cache, together.
LAYERS_BYTES = 192 * 2**20
CELL_SECONDS = 2.0
FEWEST_REPETITIONS, MOST_REPETITIONS = 7, 60


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of one layer's experts."""

    hidden: int
    inner: int
    experts: int

    def __str__(self) -> str:
        return f"hidden {self.hidden}, inner {self.inner}, {self.experts} experts, top {TOP_K}"


SHAPES = (Shape(1024, 2816, 4), Shape(768, 1024, 4), Shape(1024, 1408, 8), Shape(3584, 1408, 4))


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result: milliseconds of every kernel, and how many times as fast as the loop each is."""

    tokens: int
    milliseconds: dict[str, float]
    speed: dict[str, float]
    target: float | None

    @property
    def verdict(self) -> str:
        """Whether the target is met, in words."""
        if self.target is None:
            return "none"
        return f"≥ {self.target} {'met' if self.speed['cpu_packed'] >= self.target else '**missed**'}"


@dataclass(frozen=True, slots=True)
class Section:
    """One shape and dtype."""

    title: str
    rows: list[Row]
    memory_ratio: float
    kernel: str
    # Bytes of weights that one token reads.
    token_bytes: float

    @property
    def gigabytes_per_second(self) -> float:
        """How fast cpu_packed reads weights for one token."""
        return self.token_bytes / self.rows[0].milliseconds["cpu_packed"] / 1e6


def make_layer(shape: Shape, dtype: torch.dtype) -> ExpertWeights:
    """Random weights of one layer."""

    def random(*sizes: int) -> torch.Tensor:
        return (torch.randn(sizes) / math.sqrt(sizes[-1])).to(dtype)

    return ExpertWeights(
        random(shape.experts, shape.inner, shape.hidden),
        random(shape.experts, shape.inner, shape.hidden),
        random(shape.experts, shape.hidden, shape.inner),
    )


def measure(layers: dict[str, list[PreparedExperts]], shape: Shape, dtype: torch.dtype, tokens: int) -> Row:
    """One line: as many repetitions as fit the time, after one that does not count."""
    x_TD = torch.randn((tokens, shape.hidden)).to(dtype)
    index_TK = torch.rand((tokens, shape.experts)).argsort(dim=1)[:, :TOP_K].int()
    weight_TK = torch.rand((tokens, TOP_K)).to(dtype)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    repetitions = MOST_REPETITIONS
    repetition = 0
    while repetition <= repetitions:
        for name, prepared in layers.items():
            layer = prepared[repetition % len(prepared)]
            started = time.perf_counter()
            layer.forward(x_TD, index_TK, weight_TK)
            seconds[name].append(time.perf_counter() - started)
        if repetition == 0:
            fitting = CELL_SECONDS / sum(times[0] for times in seconds.values())
            repetitions = max(FEWEST_REPETITIONS, min(MOST_REPETITIONS, int(fitting)))
        repetition += 1
    counted = {name: times[1:] for name, times in seconds.items()}
    return Row(
        tokens,
        {name: 1e3 * statistics.median(times) for name, times in counted.items()},
        {
            name: statistics.median(loop / own for loop, own in zip(counted[BASELINE], times, strict=True))
            for name, times in counted.items()
        },
        TARGETS[dtype].get(tokens),
    )


def sections(progress: Progress) -> Iterator[Section]:
    """All that is measured, one shape and dtype after the other."""
    task = progress.add_task("kernels", total=len(SHAPES) * len(TARGETS) * len(TOKENS))
    for shape in SHAPES:
        for dtype in TARGETS:
            title = f"{str(dtype).removeprefix('torch.')}, {shape}"
            progress.update(task, description=title)
            first = make_layer(shape, dtype)
            plain = [first] + [make_layer(shape, dtype) for _ in range(LAYERS_BYTES // first.nbytes)]
            layers = {name: [get_kernel(name).load(weights) for weights in plain] for name in KERNELS}
            rows = []
            for tokens in TOKENS:
                rows.append(measure(layers, shape, dtype, tokens))
                progress.advance(task)
            packed = layers["cpu_packed"][0]
            kernel = kernel_in_use(get_kernel("cpu_packed"), packed)
            yield Section(title, rows, packed.nbytes / first.nbytes, kernel, first.nbytes * TOP_K / shape.experts)


def memory_ceiling() -> float:
    """Gigabytes per second that one thread reads when it does nothing but add numbers up: the best of ten."""
    numbers = torch.ones(LAYERS_BYTES // 4)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - started)
    return numbers.nbytes / min(seconds) / 1e9


def print_table(section: Section, console: Console) -> None:
    """Shows one section while the others are still being measured."""
    table = Table(title=section.title)
    for heading in ("tokens", *(f"{name} ms" for name in KERNELS), "torch_grouped ×", "cpu_packed ×", "target"):
        table.add_column(heading, justify="right")
    for row in section.rows:
        table.add_row(*_cells(row))
    console.print(table)


def markdown(measured: list[Section], ceiling: float) -> str:
    """The result file's text."""
    lines = [
        "# Expert kernels on a CPU",
        "",
        describe(),
        f"One thread ({torch.backends.cpu.get_cpu_capability()}); `python -m benchmarks.kernels_cpu`.",
        "Milliseconds of one call, medians. × is how many times as fast as `reference`, the Python loop over experts "
        "with stock linears: the median over repetitions in which all kernels computed the same call in turn, each "
        f"repetition with another layer's weights ({LAYERS_BYTES // 2**20} MiB of layers, more than the cache). Memory "
        "is that of the packed weights over the plain ones; plain ones are not kept.",
        "",
        f"One thread that only sums numbers reads {ceiling:.1f} GB/s here: no kernel can be much faster.",
    ]
    for section in measured:
        met = "met" if section.memory_ratio <= MEMORY_TARGET else "**missed**"
        lines += [
            "",
            f"## {section.title}",
            "",
            f"Computed by {section.kernel}; memory × {section.memory_ratio:.3f} (target ≤ {MEMORY_TARGET}: {met}); "
            f"one token reads its weights at {section.gigabytes_per_second:.1f} GB/s.",
            "",
            "| tokens | "
            + " | ".join(f"{name}, ms" for name in KERNELS)
            + " | torch_grouped × | cpu_packed × | target |",
            "| ---: " * (len(KERNELS) + 4) + "|",
        ]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in section.rows]
    missed = [
        f"- {section.title}: {row.tokens} tokens, {row.speed['cpu_packed']:.2f} instead of {row.target}"
        for section in measured
        for row in section.rows
        if "missed" in row.verdict
    ]
    lines += ["", "## Short of the target", "", *(missed or ["Nothing."])]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    milliseconds = (f"{row.milliseconds[name]:.2f}" for name in KERNELS)
    return [str(row.tokens), *milliseconds, *(f"{row.speed[name]:.2f}" for name in KERNELS[1:]), row.verdict]


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULT, help="where the result goes (default: %(default)s)")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console()
    measured = []
    ceiling = memory_ceiling()
    with torch.inference_mode(), Progress(console=console) as progress:
        for section in sections(progress):
            print_table(section, console)
            measured.append(section)
    output.write_text(markdown(measured, ceiling))
    console.print(f"written to {output}", markup=False)


if __name__ == "__main__":
    main()
