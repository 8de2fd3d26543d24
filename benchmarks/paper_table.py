"""The paper's comparison in miniature: `python -m benchmarks.paper_table`.

EchoVLM (arXiv 2509.14977) reports that its mixture of experts writes better reports than its dense backbone. Here both
are trained small, on the same phantoms, with the same steps and seeds, next to variants that differ in one part each:

  dense          Qwen2-VL's layers, no experts: the baseline
  dense-large    the same with as many parameters as the MoE
  moe            EchoVLM's layers: 4 experts, top-2, a shared expert, one gate for all organs
  top-1          each token goes to one expert
  no-shared      without the shared expert
  by-organ       each organ has 4 experts and gate rows of its own; the organ gate chooses
  ungated-large  as many experts as by-organ, and one gate for all organs

Reports on phantoms that none has seen are scored by BLEU-1, ROUGE-1 and attribute F1. Writes
`benchmarks/results/paper_table.md`, `.json` and `.png`. It takes an hour on one core.

Each variant of each seed is a cell, kept in --work when it is done. A run that was stopped goes on with the cells that
are missing: give the same command again. Several processes may share the folder if each has other --seeds. For a quick
look: --seeds 0 --variants dense moe --steps 100 --pictures 500 --look-steps 50 --work FOLDER --out FOLDER.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.drawing import check_drawing
from benchmarks.machine import describe
from benchmarks.terminal import add_result_options, keep_result

WORK = Path("build/paper_table")
VARIANTS = ("dense", "dense-large", "moe", "top-1", "no-shared", "by-organ", "ungated-large")


def main() -> None:
    """Trains what is missing, scores, prints and writes the result."""
    options = _options()
    check_drawing()
    # They need what only training and evaluation install, and --help does not.
    from benchmarks.paper_table_cells import ScaleDiffersError, run_cells
    from benchmarks.paper_table_data import Scale, items_of, open_phantoms
    from benchmarks.paper_table_report import draw, page
    from benchmarks.paper_table_scores import scores_of
    from echovlm_ray.training.errors import TrainingError, TrainingInterrupted

    console = Console(stderr=options.json)
    torch.set_num_threads(options.threads)
    given = {name: getattr(options, name) for name in ("steps", "look_steps", "pictures", "held_out")}
    scale = Scale.model_validate({name: value for name, value in given.items() if value is not None})
    seeds = sorted(set(options.seeds))
    try:
        cells = run_cells(options.work, scale, seeds, options.variants, console)
    except (TrainingInterrupted, KeyboardInterrupt):
        sys.exit("stopped: the same command goes on with the cells that are missing")
    except (ScaleDiffersError, TrainingError) as error:
        sys.exit(str(error))
    items = items_of(open_phantoms(options.work, scale, held_out=True))
    scores = scores_of(items, cells)
    text = page(scores, cells, scale, items)
    values = {
        "machine": describe(),
        "scale": scale.model_dump(mode="json"),
        "seeds": seeds,
        **scores.as_json(),
        "cells": [cell.model_dump(exclude={"answers", "organs"}) for cell in cells],
    }
    draw(scores, keep_result("paper_table", text, values, options, console))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run of each variant for each (default: 0 1 2)"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="NAME", help="only these (default: all)"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps of each variant (default: see the result's page)")
    parser.add_argument("--look-steps", type=int, help="steps of the vision tower's warm-up")
    parser.add_argument("--pictures", type=int, help="phantoms to learn from")
    parser.add_argument("--held-out", type=int, help="phantoms of another seed to be asked about")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, default=WORK, help="folder for phantoms, towers and finished cells (default: %(default)s)"
    )
    add_result_options(parser)
    options = parser.parse_args()
    for name in ("steps", "look_steps", "pictures", "held_out", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if any(seed < 0 for seed in options.seeds):
        parser.error("--seeds must be 0 or more")
    return options


if __name__ == "__main__":
    main()
