"""matplotlib, which draws the benchmarks' pictures. `make serve` does not install it; `make benchmarks` does."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def check_drawing() -> None:
    """Ends the program with what to install where matplotlib is missing; call it before anything is measured."""
    if find_spec("matplotlib") is None:
        sys.exit(
            "this benchmark draws its result with matplotlib, which is not installed: "
            "run `make benchmarks`, or pip install 'echovlm-ray[plots]'"
        )


def new_figure(columns: int = 1, rows: int = 1, **options: Any) -> Any:
    """A matplotlib figure with `figure.axes`, and what `pyplot.subplots` takes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, _ = pyplot.subplots(rows, columns, layout="constrained", **({"figsize": (15, 4.5)} | options))
    return figure


def save_figure(figure: Any, path: Path, title: str = "") -> None:
    """Writes a figure as PNG, with a grid in all axes and a title above them."""
    from matplotlib import pyplot

    for axis in figure.axes:
        axis.grid(alpha=0.3)
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
