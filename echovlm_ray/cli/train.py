"""`echoray train`: a whole model, or one organ's experts. Loads torch only inside a command."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from echovlm_ray.cli.terminal import say
from echovlm_ray.cli.work import fail

if TYPE_CHECKING:
    from echovlm_ray.training.recipe import Recipe
    from echovlm_ray.training.run import Run
    from echovlm_ray.training.sources import DataFiles

EXIT_ENDED = 1
EXIT_INVALID = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True, help="Train a whole model, or one organ's experts.", rich_markup_mode="markdown"
)

Data = Annotated[
    list[Path] | None, typer.Option("--data", help="A file of records to train on; can be given several times.")
]
Images = Annotated[
    Path | None, typer.Option(help="The folder that image paths are relative to. [default: that of each file]")
]
ValidationFiles = Annotated[
    list[Path] | None, typer.Option("--validation", help="A file of records to measure on, and not to train on.")
]
Output = Annotated[Path | None, typer.Option("--output", help="The run's folder, to be made.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="A YAML file, or one that comes with the project.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Change a field of the recipe, like stages.0.steps=100.")
]
Resume = Annotated[Path | None, typer.Option(help="Go on with the run in this folder; takes no other data or recipe.")]
Workers = Annotated[int, typer.Option(min=1, help="How many processes train; more than one are started through Ray.")]
Device = Annotated[str, typer.Option(help="cpu or cuda; auto takes a GPU where there is one.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="torch's threads a process. Another number gives other last bits.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options that both commands have. Typer reads a command's options from its own parameters alone."""

    data: list[Path] | None
    images: Path | None
    validation: list[Path] | None
    output: Path | None
    recipe: str
    settings: list[str] | None
    resume: Path | None
    workers: int
    device: str
    threads: int | None
    quiet: bool

    @property
    def how(self) -> dict[str, Any]:
        """How to train, for `train_stages` and `train_expert`."""
        return {"workers": self.workers, "device": self.device, "threads": self.threads, "quiet": self.quiet}


@app.command("model")
def model_command(
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="The folder of a dense Qwen2-VL, which is upcycled, or of an EchoVLM, which is trained on. "
            "[default: a small model with random weights]",
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Of --from take configuration and tokenizer, and begin at random.")
    ] = False,
    data: Data = None,
    images: Images = None,
    validation: ValidationFiles = None,
    output: Output = None,
    recipe: RecipeName = "scratch",
    settings: Settings = None,
    resume: Resume = None,
    workers: Workers = 1,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Trains a whole model: from a dense Qwen2-VL, from an EchoVLM, or from random weights.

    A dense model gets its experts so that it computes at first exactly what it did before. The recipe decides what
    learns, how fast and for how long; `paper` has the two stages of EchoVLM's paper.

    The run's folder holds recipe, checkpoints, log, curves, and at the end `model/` in the released layout. Ctrl-C
    saves a checkpoint and prints how to resume, as does any other end of a run. A resumed run gives the same bytes as
    if it had never been stopped.

    The exit status is 0 when the model is trained, 1 when a run ended before its time, 2 when something that was given
    cannot be used and nothing was begun, 130 after Ctrl-C.

    Example: `echoray train model --from Qwen2-VL-7B-Instruct --recipe paper --data train.json --output runs/first`

    Example: `echoray train model --data train.json --set stages.0.epochs=3 --output runs/small`

    Example: `echoray train model --resume runs/first`

    Then: `echoray checkpoint split runs/first/model checkpoints/mine`
    """
    options = RunOptions(data, images, validation, output, recipe, settings, resume, workers, device, threads, quiet)
    with training_errors():
        from echovlm_ray.training.run import Run, train_stages
        from echovlm_ray.training.small_start import write_small_start
        from echovlm_ray.training.start import find_start

        def new_run(folder: Path, files: "DataFiles", chosen: "Recipe") -> Run:
            if start is not None:
                return Run(kind="model", start=find_start(start, fresh=fresh), files=files)
            if fresh:
                fail("--fresh needs --from, the folder whose configuration to use", EXIT_INVALID)
            _require_new(folder)
            small = write_small_start(folder.with_name(f"{folder.name}.start"), chosen)
            return Run(kind="model", start=small, files=files)

        folder, run, chosen = _open_run(options, "model", new_run)
        made = train_stages(folder, run, chosen, **options.how)
    say(f"Trained: {made}")
    say(f"Next: echoray checkpoint split {made} CHECKPOINT")


@app.command("expert")
def expert_command(
    organ: Annotated[str | None, typer.Option(help="Whose experts, like breast.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The split checkpoint: its backbone, and the organ's current bundle.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Start from this version. [default: the one that the checkpoint names]")
    ] = None,
    version: Annotated[str | None, typer.Option(help="The new bundle's version. [default: the next minor one]")] = None,
    card: Annotated[
        Path | None, typer.Option(help="A YAML file with what you say about the bundle: authors, license, data_source.")
    ] = None,
    data: Data = None,
    images: Images = None,
    validation: ValidationFiles = None,
    output: Output = None,
    recipe: RecipeName = "expert",
    settings: Settings = None,
    resume: Resume = None,
    workers: Workers = 1,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Trains one organ's experts and gate rows; everything else is frozen, so no other organ's answers change.

    Pictures are encoded once and kept in the run's folder. The end is a bundle with prototype, self-test, metrics and a
    summary of the data, with a model card, ready to be pushed, staged and promoted. Ctrl-C saves and says how
    to go on.

    The exit status is 0 when the bundle is packed, 1 when a run ended before its time, 2 when something that was given
    cannot be used and nothing was begun, 130 after Ctrl-C.

    Example: `echoray train expert --organ breast --checkpoint checkpoints/demo --data breast.json --output runs/breast`

    Example: `echoray train expert --resume runs/breast`

    Then: `echoray experts verify runs/breast/breast-1.1.0 --checkpoint checkpoints/demo`
    """
    options = RunOptions(data, images, validation, output, recipe, settings, resume, workers, device, threads, quiet)
    with training_errors():
        from echovlm_ray.training.expert import next_version, require_experts_only, require_later, train_expert
        from echovlm_ray.training.run import Run
        from echovlm_ray.training.start import Start, organ_bundle
        from experts.bundles.manifest import check_version

        def new_run(folder: Path, files: "DataFiles", chosen: "Recipe") -> Run:
            if organ is None or checkpoint is None:
                fail("a new run needs --organ and --checkpoint", EXIT_INVALID)
            require_experts_only(chosen)
            current = organ_bundle(checkpoint, organ, base).manifest.version
            try:
                made_version = check_version(version or next_version(current))
            except ValueError as error:
                fail(str(error), EXIT_INVALID)
            require_later(made_version, current)
            begins = Start(kind="organ", folder=checkpoint, organ=organ, version=base)
            return Run(kind="expert", start=begins, files=files, version=made_version, card=card)

        folder, run, chosen = _open_run(options, "expert", new_run)
        bundle, manifest = train_expert(folder, run, chosen, **options.how)
    for name, value in sorted(manifest.eval_metrics.items()):
        say(f"{name}: {value:.4g}")
    say(f"Packed {manifest.organ}@{manifest.version} into {bundle}: {manifest.digest}")
    say(f"Next: echoray experts push {bundle}")


@app.command("demo")
def demo_command(
    folder: Annotated[Path, typer.Argument(help="The work folder, to be made: phantoms, runs, checkpoints; 2 GB.")],
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Trains the demo model again, from random weights on synthetic phantoms; an hour on two cores.

    Two runs: backbone and experts on the phantoms of all regions (recipe `demo`), which never see a simple cyst of the
    breast; then version 1.1.0 of the breast's experts, which does (recipe `demo-expert`). After Ctrl-C the same command
    goes on. `echoray checkpoint demo` converts the result, `demo_model/` in the work folder, to a checkpoint.

    Example: `echoray train demo build/demo-model`
    """
    with training_errors():
        from echovlm_ray.training.demo_model import train_demo

        _quiet_libraries()
        made = train_demo(folder, threads=threads, quiet=quiet)
    say(f"Trained: {made}")


@contextmanager
def training_errors(code: int = EXIT_ENDED) -> Iterator[None]:
    """Turns what a user did, and what a disk does, into one text without a traceback.

    Args:
        code: the exit status of what ends a run; of what cannot be used to begin one, `EXIT_INVALID`.
    """
    from echovlm_ray.checkpoint.layout import InvalidCheckpointError
    from echovlm_ray.training.errors import TrainingError, TrainingInterrupted
    from echovlm_ray.training.examples import ExampleError
    from echovlm_ray.yaml_document import DocumentError
    from experts.errors import InvalidBundleError, RegistryError, UnknownBundleError

    try:
        yield
    except DocumentError as error:
        fail(str(error), EXIT_INVALID)
    except TrainingInterrupted as stopped:
        say(str(stopped), err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (
        ExampleError,
        InvalidBundleError,
        InvalidCheckpointError,
        RegistryError,
        TrainingError,
        UnknownBundleError,
    ) as error:
        fail(" ".join(str(error).split()), code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}", code)
    except KeyboardInterrupt:
        fail(
            "interrupted before the run could be saved; go on from its last checkpoint with --resume", EXIT_INTERRUPTED
        )


def _open_run(
    options: RunOptions, kind: Literal["model", "expert"], new_run: "Callable[[Path, DataFiles, Recipe], Run]"
) -> "tuple[Path, Run, Recipe]":
    """Folder, run and recipe of the resumed run, or of a new one."""
    _quiet_libraries()
    with training_errors(EXIT_INVALID):
        return _opened(options, kind, new_run)


def _opened(
    options: RunOptions, kind: Literal["model", "expert"], new_run: "Callable[[Path, DataFiles, Recipe], Run]"
) -> "tuple[Path, Run, Recipe]":
    from echovlm_ray.training.recipe_file import load_recipe
    from echovlm_ray.training.run import begin_run, read_run, require_start
    from echovlm_ray.training.sources import require_files

    if options.resume is None:
        recipe = load_recipe(options.recipe, options.settings)
        folder, files = _new_files(options, phantoms=recipe.data.phantoms is not None)
        require_files(files, recipe.data, seed=recipe.seed)
        run = new_run(folder, files, recipe)
        begin_run(folder, run, recipe)
        return folder, run, recipe
    if options.data or options.output is not None or options.settings:
        fail("--resume goes on with the run as it was begun: leave --data, --output and --set out", EXIT_INVALID)
    run, recipe = read_run(options.resume)
    if run.kind != kind:
        fail(f"{options.resume} is a run of `echoray train {run.kind}`: go on with that", EXIT_INVALID)
    require_start(run.start)
    return options.resume, run, recipe


def _new_files(options: RunOptions, *, phantoms: bool) -> "tuple[Path, DataFiles]":
    """The folder and the data of a new run."""
    from pydantic import ValidationError

    from echovlm_ray.training.sources import DataFiles

    if options.output is None or not (options.data or phantoms):
        fail(
            "a new run needs --output, and --data or a recipe with data.phantoms; to go on with one, give --resume",
            EXIT_INVALID,
        )
    if options.data and phantoms:
        fail("the recipe has data.phantoms and --data is given: leave one of them out", EXIT_INVALID)
    try:
        files = DataFiles(
            train=tuple(options.data or ()), images=options.images, validation=tuple(options.validation or ())
        )
    except ValidationError as error:
        fail(error.errors(include_url=False)[0]["msg"].removeprefix("Value error, "), EXIT_INVALID)
    return options.output, files


def _require_new(folder: Path) -> None:
    if folder.exists():
        fail(f"{folder} exists: go on with it by --resume, or give another folder", EXIT_INVALID)


def _quiet_libraries() -> None:
    """Disables transformers' progress bars in favour of ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
