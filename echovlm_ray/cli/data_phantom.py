"""`echoray data phantom`: writes synthetic ultrasound with known content."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echovlm_ray.cli.terminal import console_of, say, say_json
from echovlm_ray.cli.work import fail
from echovlm_ray.tasks import LANGUAGES, phantom_tasks

if TYPE_CHECKING:
    from echovlm_ray.data.phantom.corpus import Corpus
    from echovlm_ray.data.phantom.settings import Settings

# Contact sheets: phantoms of each class, and JPEG quality.
_SHEET_EACH, _SHEET_QUALITY = 4, 60
_SHEET_SUFFIXES = (".png", ".jpg", ".jpeg")


def phantom_command(
    directory: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The folder to write to. It must not exist, or must be empty.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of phantoms. Classes alternate.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    first: Annotated[
        int, typer.Option(min=0, help="The first phantom's number. Other ranges of a seed have other phantoms.")
    ] = 0,
    organ: Annotated[
        str, typer.Option(help="Only these regions, separated by commas, like breast,liver. [default: all seven]")
    ] = "",
    class_: Annotated[
        str,
        typer.Option("--class", help="Only these classes, like breast/simple_cyst or simple_cyst. [default: all]"),
    ] = "",
    exclude: Annotated[str, typer.Option(help="Without these classes, to hold them out: breast/simple_cyst.")] = "",
    language: Annotated[str, typer.Option(help="en, zh or both.")] = "both",
    task: Annotated[
        str,
        typer.Option(help=f"What is asked, separated by commas: {', '.join(phantom_tasks())}; or all."),
    ] = "report",
    questions: Annotated[int, typer.Option(min=1, help="With vqa: the number of questions per phantom.")] = 2,
    format_: Annotated[str, typer.Option("--format", help="png; dicom; or cine, a loop as multi-frame DICOM.")] = "png",
    frames: Annotated[int, typer.Option(min=2, max=200, help="With cine: frames of a loop.")] = 12,
    settings: Annotated[
        str,
        typer.Option(
            help="How images are displayed and stored, for tests of robustness: gain=1.12,blur=0.6,jpeg_quality=80. "
            "gain multiplies grey values, blur is in pixels."
        ),
    ] = "",
    contact_sheet: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Also draw a sheet (PNG or JPEG) with four phantoms of each class."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes. The bytes do not depend on it.")] = 1,
    list_: Annotated[bool, typer.Option("--list", help="Print the classes and their attributes, and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Writes ultrasound phantoms: synthetic images with known content, and true reports about them.

    There are seven regions, each normal and with four to seven diseases. Every image is computed from scatterers, a
    probe's beam, and tissue that reflects and attenuates. Records have questions and true answers, in English and
    Chinese. OUT then contains `images/`, `records.json` for `echoray data check` and `echoray train`, and `about.json`.

    Reports state only what the pixels show: a side only if there is a body marker, sizes as classes, no millimetres, no
    flow.

    **A demonstration corpus: no patient was examined, and a model trained on it is not for diagnosis.**

    Example: `echoray data phantom phantoms --count 300`

    Example: `echoray data phantom robust --count 430 --seed 7 --settings gain=1.12,blur=0.6,jpeg_quality=80`

    Example: `echoray data phantom held --class breast/simple_cyst --format dicom --language en --task report,diagnosis`

    Example: `echoray data phantom loops --organ heart --count 6 --format cine --contact-sheet hearts.png`
    """
    if list_:
        _print_classes(as_json)
        return
    if directory is None:
        fail("OUT is missing: name the folder to write to, or use --list to see the classes", code=2)
    if contact_sheet is not None and contact_sheet.suffix.lower() not in _SHEET_SUFFIXES:
        fail(f"--contact-sheet must end in one of {', '.join(_SHEET_SUFFIXES)}", code=2)
    corpus = _corpus(seed, range(first, first + count), organ, class_, exclude)
    corpus = _with_options(corpus, language, task, questions, format_, frames, settings)
    _write(directory, corpus, workers, contact_sheet, as_json)


def _write(directory: Path, corpus: "Corpus", workers: int, contact_sheet: Path | None, as_json: bool) -> None:
    from echovlm_ray.checkpoint.atomic import require_vacant_file
    from echovlm_ray.checkpoint.layout import InvalidCheckpointError
    from echovlm_ray.data.phantom.corpus import write_corpus
    from echovlm_ray.data.phantom.phantom import NOTICE

    try:
        if contact_sheet is not None:
            require_vacant_file(contact_sheet)
        with _progress(len(corpus.indices)) as advance:
            counts = write_corpus(directory, corpus, workers=workers, progress=advance)
        if contact_sheet is not None:
            _write_sheet(corpus, contact_sheet)
    except InvalidCheckpointError as error:
        fail(str(error), code=2)
    except OSError as error:
        fail(f"{error.filename or directory}: {error.strerror or error}")
    except KeyboardInterrupt:
        fail(f"interrupted; {directory} holds pictures without records: remove it", code=130)
    if as_json:
        say_json({"directory": str(directory), **corpus.facts(), "phantoms": counts}, indent=2)
        return
    classes = f"{len(counts)} {'class' if len(counts) == 1 else 'classes'}"
    say(f"Wrote {sum(counts.values())} phantoms of {classes} to {directory}.")
    say(f"Each is a {NOTICE}.")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _corpus(seed: int, indices: range, organ: str, class_: str, exclude: str) -> "Corpus":
    from echovlm_ray.data.phantom.catalogue import UnknownClassError, select_classes
    from echovlm_ray.data.phantom.corpus import Corpus

    try:
        return Corpus(seed, indices, select_classes(_names(organ), _names(class_), _names(exclude)))
    except UnknownClassError as error:
        fail(str(error), code=2)


def _with_options(
    corpus: "Corpus", language: str, task: str, questions: int, format_: str, frames: int, settings: str
) -> "Corpus":
    from dataclasses import replace

    from echovlm_ray.data.phantom.corpus import FILE_FORMATS

    wanted = _names(task)
    if wanted == ("all",):
        wanted = phantom_tasks()
    unknown = set(wanted) - set(phantom_tasks())
    if unknown or not wanted:
        fail(f"--task {task!r} is not among {', '.join(phantom_tasks())}, all", code=2)
    if language not in (*LANGUAGES, "both"):
        fail(f"--language {language!r} is not among en, zh, both", code=2)
    if format_ not in FILE_FORMATS:
        fail(f"--format {format_!r} is not among {', '.join(FILE_FORMATS)}", code=2)
    return replace(
        corpus,
        tasks=tuple(name for name in phantom_tasks() if name in wanted),
        languages=tuple(name for name in LANGUAGES if language in (name, "both")),
        questions_each=questions,
        file_format=next(name for name in FILE_FORMATS if name == format_),
        frames=frames,
        settings=_settings(settings),
    )


def _settings(text: str) -> "Settings":
    from pydantic import ValidationError

    from echovlm_ray.data.phantom.settings import Settings

    values = dict(name.partition("=")[::2] for name in _names(text))
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "settings"
        fail(f"--settings: {where}: {first['msg']}. Write it like gain=1.12,blur=0.6,jpeg_quality=80", code=2)


def _write_sheet(corpus: "Corpus", path: Path) -> None:
    from echovlm_ray.data.phantom.contact_sheet import contact_sheet
    from echovlm_ray.data.phantom.corpus import sample

    groups = [(name, [corpus.picture(index) for index in indices]) for name, indices in sample(corpus, _SHEET_EACH)]
    # PNG ignores the quality.
    contact_sheet(groups).save(path, quality=_SHEET_QUALITY)


def _print_classes(as_json: bool) -> None:
    from echovlm_ray.data.phantom.phantom import NOTICE
    from echovlm_ray.data.phantom.regions import REGIONS

    table = {
        f"{organ}/{phantom_class.name}": {name: list(values) for name, values in phantom_class.choices.items()}
        for organ, region in REGIONS.items()
        for phantom_class in region.classes
    }
    if as_json:
        say_json({"notice": NOTICE, "classes": table}, indent=2)
        return
    for name, choices in table.items():
        say(name)
        say("    " + ", ".join(f"{attribute}: {' | '.join(values)}" for attribute, values in choices.items()))
    say(f"Each is a {NOTICE}.")


@contextmanager
def _progress(count: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, if it is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = console_of(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("drawing phantoms", total=count)
        yield lambda finished: bar.advance(task, finished)
