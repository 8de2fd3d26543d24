"""matplotlib, which draws the benchmarks' pictures. `make serve` does not install it; `make benchmarks` does."""

import sys
from importlib.util import find_spec
from typing import Any


def check_drawing() -> None:
    """Ends the program with what to install where matplotlib is missing; call it before anything is measured."""
    if find_spec("matplotlib") is None:
        sys.exit(
            "this benchmark draws its result with matplotlib, which is not installed: "
            "run `make benchmarks`, or pip install 'echovlm-ray[plots]'"
        )


def load_pyplot() -> Any:
    """`matplotlib.pyplot`, which draws into files here."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
