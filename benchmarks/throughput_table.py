"""What the throughput benchmark found: its cells, its ratios against the targets, and both as Markdown and JSON."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measure_table import table_head
from benchmarks.timings import Timings, percentile

SERVED, ENGINE, GENERATE = "served", "engine", "generate"
# Threads of every process where the command line does not say.
DEFAULT_THREADS = {SERVED: 1, ENGINE: 1, GENERATE: 2}
# Streams → what the served system should decode, as a multiple of plain `generate`.
DECODE_TARGETS = {1: 1.6, 8: 2.0}
TITLES = {SERVED: "served system", ENGINE: "engine, experts in process", GENERATE: "plain `generate`"}


@dataclass(frozen=True, slots=True)
class System:
    """A system with its torch threads for each process."""

    kind: str
    threads: int

    @classmethod
    def parse(cls, text: str) -> "System":
        """Reads `kind` or `kind:threads`.

        Raises:
            ValueError: no such system, or no number of threads.
        """
        kind, colon, threads = text.strip().partition(":")
        if kind not in DEFAULT_THREADS or (colon and not (threads.isdecimal() and int(threads))):
            raise ValueError(
                f"{text!r} is no system: give {', '.join(DEFAULT_THREADS)}, each with :THREADS if you like"
            )
        return cls(kind, int(threads) if threads else DEFAULT_THREADS[kind])

    def __str__(self) -> str:
        return f"{TITLES[self.kind]}, {self.threads} thread{'s' if self.threads > 1 else ''}"


@dataclass(slots=True)
class Cell:
    """All runs of one system with so many streams."""

    system: System
    streams: int
    runs: list[Timings] = field(default_factory=list)

    @property
    def decode(self) -> list[float]:
        """Tokens a second while all streams decode, of each run."""
        return [run.decode_tokens_per_s for run in self.runs]

    @property
    def prefill(self) -> list[float]:
        """Prompt tokens a second until the last stream has its first token, of each run."""
        return [run.prefill_tokens_per_s for run in self.runs]

    @property
    def overall(self) -> list[float]:
        """New tokens a second over the whole time, of each run."""
        return [run.tokens_per_s for run in self.runs]

    def first_token_ms(self, percent: float) -> float:
        """A percentile of the time to the first token, over all streams of all runs."""
        return 1e3 * percentile([value for run in self.runs for value in run.time_to_first_token], percent)

    def inter_token_ms(self, percent: float) -> float:
        """A percentile of the pauses between two tokens, over all streams of all runs."""
        return 1e3 * percentile([value for run in self.runs for value in run.inter_token_latency], percent)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "system": self.system.kind,
            "threads": self.system.threads,
            "streams": self.streams,
            "decode_tokens_per_s": self.decode,
            "prefill_tokens_per_s": self.prefill,
            "tokens_per_s": self.overall,
            "first_token_ms": {"p50": self.first_token_ms(50), "p99": self.first_token_ms(99)},
            "inter_token_ms": {"p50": self.inter_token_ms(50), "p99": self.inter_token_ms(99)},
        }


@dataclass(frozen=True, slots=True)
class Ratio:
    """A measure with a target. It is taken within each run, where both sides met the same machine.

    Attributes:
        values: one for each run.
        at_least: whether the target is the least it may be, rather than the most.
    """

    measure: str
    values: tuple[float, ...]
    target: float
    at_least: bool

    @property
    def value(self) -> float:
        """The median."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool:
        """Whether the median meets the target."""
        return self.value >= self.target if self.at_least else self.value <= self.target

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"measure": self.measure, "values": self.values, "target": self.target, "met": self.met}


def ratios(cells: Iterable[Cell]) -> list[Ratio]:
    """The measures with a target that can be taken from these cells."""
    by_key = {(cell.system, cell.streams): cell for cell in cells}
    targets = {(GENERATE, streams): target for streams, target in DECODE_TARGETS.items()} | {(ENGINE, 8): 0.95}
    found = []
    for (system, streams), cell in by_key.items():
        if system.kind != SERVED:
            continue
        for (other, other_streams), base in by_key.items():
            target = targets.get((other.kind, streams))
            if target is None or other_streams != streams:
                continue
            values = tuple(mine / its for mine, its in zip(cell.decode, base.decode, strict=True))
            noun = "stream" if streams == 1 else "streams"
            found.append(Ratio(f"{system} ÷ {other}: decode, {streams} {noun}", values, target, at_least=True))
        if streams == 32:
            values = tuple(_ratio_of_percentiles(run) for run in cell.runs)
            found.append(Ratio(f"{system}: first token p99 ÷ p50, 32 streams", values, 3.0, at_least=False))
    return found


def _ratio_of_percentiles(run: Timings) -> float:
    times = run.time_to_first_token
    return percentile(times, 99) / percentile(times, 50)


def ratio_table(found: Sequence[Ratio]) -> list[str]:
    """The ratios with their targets, as lines of Markdown."""
    lines = table_head("| measure | median | of all runs | target | |")
    for ratio in found:
        sign, verdict = "≥" if ratio.at_least else "≤", "met" if ratio.met else "**missed**"
        lines.append(
            f"| {ratio.measure} | **{ratio.value:.2f}** | {_spread(ratio.values, '.2f')} | {sign} {ratio.target} "
            f"| {verdict} |"
        )
    return lines


def cell_table(cells: Sequence[Cell]) -> list[str]:
    """All cells, as lines of Markdown."""
    lines = table_head(
        "| system | streams | decode, tokens/s | of all runs | prefill, tokens/s | first token, ms: p50 | p99 "
        "| between tokens, ms: p50 | p99 |"
    )
    for cell in cells:
        milliseconds: list[Callable[[float], float]] = [cell.first_token_ms, cell.inter_token_ms]
        latencies = " | ".join(f"{of(percent):,.0f}" for of in milliseconds for percent in (50, 99))
        decode = f"{statistics.median(cell.decode):,.1f} | {_spread(cell.decode, ',.1f')}"
        prefill = f"{statistics.median(cell.prefill):,.0f}"
        lines.append(f"| {cell.system} | {cell.streams} | {decode} | {prefill} | {latencies} |")
    return lines


def _spread(values: Sequence[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"
