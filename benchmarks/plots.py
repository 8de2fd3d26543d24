"""Draws the benchmarks' results."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.drawing import new_figure, save_figure
from benchmarks.goodput import RateResult
from benchmarks.throughput_table import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_throughput(cells: Sequence[Cell], title: str, path: Path) -> None:
    """Decode throughput, first token and pause between tokens against the number of streams, a line for each system."""
    figure = new_figure(3)
    throughput, first_token, inter_token = figure.axes
    streams = sorted({cell.streams for cell in cells})
    for system in dict.fromkeys(cell.system for cell in cells):
        own = [cell for cell in cells if cell.system == system]
        x = [cell.streams for cell in own]
        label = str(system).replace("`", "")
        medians = [statistics.median(cell.decode) for cell in own]
        (line,) = throughput.plot(x, medians, marker="o", label=label)
        lowest, highest = [min(cell.decode) for cell in own], [max(cell.decode) for cell in own]
        throughput.fill_between(x, lowest, highest, alpha=0.2, color=line.get_color())
        _band(first_token, x, [(cell.first_token_ms(50), cell.first_token_ms(99)) for cell in own], line.get_color())
        _band(inter_token, x, [(cell.inter_token_ms(50), cell.inter_token_ms(99)) for cell in own], line.get_color())
    for axis, name in zip(figure.axes, ("decode, tokens/s", "first token, ms", "between tokens, ms"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(streams, [str(count) for count in streams])
        axis.set_xlabel("streams")
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
    throughput.set_title("median; shade: all runs", fontsize="medium")
    first_token.set_title("solid p50, dashed p99", fontsize="medium")
    inter_token.set_title("solid p50, dashed p99", fontsize="medium")
    throughput.legend(fontsize="small")
    save_figure(figure, path, title)


def plot_goodput(results: Sequence[RateResult], title: str, path: Path) -> None:
    """Goodput and answers a second, and latencies, against the offered rate."""
    figure = new_figure(3)
    rates, first_text, per_token = figure.axes
    offered = [result.offered for result in results]
    rates.plot(offered, offered, color="gray", linestyle=":", label="offered")
    rates.plot(offered, [result.arrived for result in results], marker="o", label="arrived")
    rates.plot(offered, [result.goodput for result in results], marker="o", label="goodput: of those, in time")
    rates.set_ylabel("requests/s")
    rates.legend(fontsize="small")
    answered = [result for result in results if result.latencies_ms]
    for axis, measure in ((first_text, "first text"), (per_token, "per token")):
        x = [result.offered for result in answered]
        values = [result.latencies_ms[measure] for result in answered]
        _band(axis, x, [(percents["p50"], percents["p99"]) for percents in values], "C0")
        axis.set_ylabel(f"{measure}, ms")
        axis.set_title("solid p50, dashed p99", fontsize="medium")
    for axis in figure.axes:
        axis.set_xlabel("offered, requests/s")
        axis.set_ylim(bottom=0)
    save_figure(figure, path, title)


def _band(axis: "Axes", x: Sequence[float], percentiles: Sequence[tuple[float, float]], color: str) -> None:
    axis.plot(x, [low for low, _ in percentiles], marker="o", color=color)
    axis.plot(x, [high for _, high in percentiles], marker="o", color=color, linestyle="--")
