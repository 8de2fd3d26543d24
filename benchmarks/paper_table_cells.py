"""All cells of the paper's comparison, each stored in a folder when it is done."""

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.paper_table_data import (
    Reports,
    Scale,
    gated_organs,
    open_phantoms,
    prepare_start,
    warm_tower,
)
from benchmarks.paper_table_training import Cell, run_cell
from benchmarks.paper_table_variants import VARIANTS, Variant

SCALE_NAME = "scale.json"


class ScaleDiffersError(ValueError):
    """A work folder has cells of another scale, which cannot be compared with these."""


def run_cells(work: Path, scale: Scale, seeds: Sequence[int], names: Sequence[str], console: Console) -> list[Cell]:
    """Trains the missing cells, all variants of one seed after another, and returns all requested cells.

    Args:
        work: the folder of phantoms, tower and cells.
        scale: how large the comparison is.
        seeds: which seeds.
        names: which variants.
        console: where to show how far it is.

    Raises:
        ScaleDiffersError: the folder has cells of another scale.
        TrainingInterrupted: Ctrl-C during the warm-up of the vision tower.
    """
    _claim(work, scale)
    variants = [variant for variant in VARIANTS if variant.name in names]
    missing = [(variant, seed) for seed in seeds for variant in variants if not _path(work, variant, seed).is_file()]
    with _progress(console) as bar:
        task = bar.add_task("drawing phantoms", total=scale.pictures + scale.held_out)
        pools = [
            open_phantoms(work, scale, held_out=held_out, progress=lambda count: bar.advance(task, count))
            for held_out in (False, True)
        ]
    if missing:
        start = prepare_start(work, scale)
        tower = warm_tower(work, scale, quiet=False)
        with _progress(console) as bar:
            task = bar.add_task("the tower looks at the pictures", total=len(missing) * scale.steps)
            train = Reports(pools[0], start, tower, work / "phantoms.safetensors", emphasis=scale.emphasis)
            held_out_reports = Reports(pools[1], start, tower, work / "held-out.safetensors")
            gated = gated_organs(train, held_out_reports)
            for variant, seed in missing:
                if _path(work, variant, seed).is_file():
                    # Another process has done it in the meantime.
                    bar.advance(task, scale.steps)
                    continue
                bar.update(task, description=f"seed {seed}: {variant.name}")
                cell = run_cell(
                    variant, seed, scale, train, held_out_reports, gated, work, lambda count: bar.advance(task, count)
                )
                _write(_path(work, variant, seed), cell)
                bar.console.print(f"seed {seed}, {variant.name}: held-out loss {cell.answer_loss:.4f}")
    return [Cell.model_validate_json(_path(work, variant, seed).read_bytes()) for variant in variants for seed in seeds]


def _write(path: Path, cell: Cell) -> None:
    # A cell that was being written when the process was killed is missing.
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(cell.model_dump_json(), encoding="utf-8")
    partial.replace(path)


def _claim(work: Path, scale: Scale) -> None:
    work.mkdir(parents=True, exist_ok=True)
    path, text = work / SCALE_NAME, scale.model_dump_json(indent=1)
    if not path.is_file():
        path.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        raise ScaleDiffersError(
            f"{work} holds cells of another scale, see {path}: give the same options, or another folder by --work"
        )


def _path(work: Path, variant: Variant, seed: int) -> Path:
    return work / f"cell-{variant.name}-{seed}.json"


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)
