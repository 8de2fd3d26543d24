"""A whole run: its folder, its stages one after the other, and going on after it was stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from echovlm_ray.checkpoint.layout import InvalidCheckpointError
from echovlm_ray.config import Section
from echovlm_ray.training.errors import TrainingError
from echovlm_ray.training.phantom_pool import PhantomPool
from echovlm_ray.training.recipe import Recipe
from echovlm_ray.training.recipe_file import load_recipe, write_recipe
from echovlm_ray.training.run_lock import LOCK_NAME, lock_run
from echovlm_ray.training.sources import DataFiles
from echovlm_ray.training.stage import HEADS_NAME, MODEL_NAME, StageJob, train_stage
from echovlm_ray.training.start import Start
from echovlm_ray.training.tracker import require_tracker

RUN_NAME = "run.json"
RECIPE_NAME = "recipe.yaml"
# The cache of examples of a run of kind "expert".
CACHE_NAME = "cache"
# The folder of a run's phantoms.
PHANTOMS_NAME = "phantoms"


class Run(Section):
    """`run.json`: the description of a run, sufficient for resuming it."""

    format: Literal["echovlm-training/1"] = "echovlm-training/1"
    kind: Literal["model", "expert"]
    start: Start
    files: DataFiles
    # With kind "expert": the version of the bundle to make, and a file with what its maker says about it.
    version: str | None = None
    card: Path | None = None


def begin_run(folder: Path, run: Run, recipe: Recipe) -> None:
    """Makes a run's folder.

    Raises:
        TrainingError: it holds something already, another process begins a run in it, or the recipe's tracker is not
            installed.
    """
    require_tracker(recipe.tracker)
    _require_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_run(folder):
        # Another process may have begun one meanwhile.
        _require_empty(folder)
        write_recipe(folder / RECIPE_NAME, recipe)
        (folder / RUN_NAME).write_text(run.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _require_empty(folder: Path) -> None:
    if folder.is_dir() and any(path.name != LOCK_NAME for path in folder.iterdir()):
        hint = "go on with it by --resume, or " if (folder / RUN_NAME).is_file() else ""
        raise TrainingError(f"{folder} is not empty: {hint}give another folder")


def read_run(folder: Path) -> tuple[Run, Recipe]:
    """What `begin_run` wrote.

    Raises:
        TrainingError: the folder is no run's.
    """
    path = folder / RUN_NAME
    if not path.is_file():
        raise TrainingError(f"{folder} is no run: it has no {RUN_NAME}; give the folder of --output")
    try:
        run = Run.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise TrainingError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return run, load_recipe(str(folder / RECIPE_NAME))


def stage_folder(folder: Path, recipe: Recipe, number: int) -> Path:
    """Where a stage has its checkpoints and its model."""
    return folder / f"{number + 1}-{recipe.stages[number].name}"


def train_stages(
    folder: Path,
    run: Run,
    recipe: Recipe,
    *,
    workers: int = 1,
    device: str = "auto",
    threads: int | None = None,
    quiet: bool = False,
    train: Callable[[StageJob], None] = train_stage,
) -> Path:
    """Trains the remaining stages of a run.

    Args:
        folder: made by `begin_run`.
        run: what it says.
        recipe: likewise.
        workers: how many processes train; more than one are started through Ray.
        device: see `StageJob`.
        threads: see `StageJob`.
        quiet: see `StageJob`.
        train: trains one stage.

    Returns:
        the folder of the finished model.

    Raises:
        TrainingInterrupted: Ctrl-C; the state was saved.
        TrainingError: it cannot go on, or another process trains it.
    """
    require_tracker(recipe.tracker)
    with lock_run(folder):
        return _train_stages(folder, run, recipe, workers, device, threads, quiet, train)


def _train_stages(
    folder: Path,
    run: Run,
    recipe: Recipe,
    workers: int,
    device: str,
    threads: int | None,
    quiet: bool,
    train: Callable[[StageJob], None],
) -> Path:
    start = run.start
    phantoms = draw_phantoms(folder, recipe, quiet=quiet)
    for number in range(len(recipe.stages)):
        stage = stage_folder(folder, recipe, number)
        model = (folder if number + 1 == len(recipe.stages) else stage) / MODEL_NAME
        if not model.is_dir():
            stage.mkdir(exist_ok=True)
            # Absolute: workers run in folders of their own.
            job = StageJob(
                folder=stage.absolute(),
                model=model.absolute(),
                number=number,
                recipe=recipe,
                start=start.model_copy(update={"folder": start.folder.absolute()}),
                files=_absolute(run.files),
                workers=workers,
                device=device,
                threads=threads,
                quiet=quiet,
                resume=f"echoray train {run.kind} --resume {folder}",
                phantoms=phantoms,
                heads=stage_folder(folder, recipe, number - 1).absolute() / HEADS_NAME if number else None,
                cache=folder.absolute() / CACHE_NAME if run.kind == "expert" else None,
                experts_only=run.kind == "expert",
            )
            if workers == 1:
                train(job)
            else:
                from echovlm_ray.training.workers import train_on_ray

                train_on_ray(job)
        start = Start(kind="trained", folder=model)
    return start.folder


def draw_phantoms(folder: Path, recipe: Recipe, *, quiet: bool) -> Path | None:
    """Draws the recipe's phantoms, unless they exist, and returns their folder; None without phantoms.

    Raises:
        ExampleError: there is no such class.
        TrainingError: the folder contains other phantoms.
    """
    section = recipe.data.phantoms
    if section is None:
        return None
    console = Console(stderr=True)
    pool = folder.absolute() / PHANTOMS_NAME
    with Progress(console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task("drawing phantoms", total=None)
        PhantomPool.open(
            pool,
            section,
            start=lambda total: bar.update(task, total=total),
            progress=lambda count: bar.advance(task, count),
        )
    return pool


def require_start(start: Start) -> None:
    """Checks that a run can be resumed.

    Raises:
        InvalidCheckpointError: its start is missing.
    """
    if not start.folder.is_dir():
        raise InvalidCheckpointError(f"{start.folder}, which the run starts from, is gone: put it back")


def _absolute(files: DataFiles) -> DataFiles:
    return DataFiles(
        train=tuple(path.absolute() for path in files.train),
        images=None if files.images is None else files.images.absolute(),
        validation=tuple(path.absolute() for path in files.validation),
    )
