"""`echoray data check | stats | split | convert`: datasets of records. Heavy imports are inside the commands."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from echovlm_ray.cli.terminal import MAX_CELL, console_of, line, name_of, say, say_json, styled
from echovlm_ray.cli.work import clear_errors, fail

if TYPE_CHECKING:
    from echovlm_ray.data.check import CheckOptions, CheckReport
    from echovlm_ray.data.media import ImageRoot
    from echovlm_ray.data.record import Record
    from echovlm_ray.data.splitting import Grouping
    from echovlm_ray.vision.images import ImageLimits
    from echovlm_ray.vision.scaling import Scaling

EXIT_FINDINGS = 1
EXIT_USAGE = 2

Files = Annotated[list[Path], typer.Argument(metavar="FILE…", help="JSON or JSON Lines files of records.")]
File = Annotated[Path, typer.Argument(metavar="FILE", help="A JSON or JSON Lines file of records.")]
Images = Annotated[
    Path | None,
    typer.Option(help="The folder that the images' paths start from. [default: the folder of each file]"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
PatientPattern = Annotated[
    str | None,
    typer.Option(
        help="A regular expression that matches the patient in a record's id: its first group, or the whole match."
    ),
]
Names = Annotated[
    bool, typer.Option("--names", help="Show ids and paths, too. Do not use it if they could identify a patient.")
]


def register(app: typer.Typer) -> None:
    """Adds the commands to `echoray data`."""
    app.command("check")(check_command)
    app.command("stats")(stats_command)
    app.command("split")(split_command)
    app.command("convert")(convert_command)


def check_command(
    files: Files,
    images: Images = None,
    no_images: Annotated[bool, typer.Option("--no-images", help="Check only the text.")] = False,
    patient_pattern: PatientPattern = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Also count tokens, with this checkpoint's tokenizer and image processor.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --checkpoint: the most tokens of a record. [default: that of the recipes, 2048]"
        ),
    ] = None,
    names: Names = False,
    as_json: AsJson = False,
) -> None:
    """Checks records and their images, and reports each problem with its line.

    Finds invalid JSON, wrong types, images that are missing, unreadable, truncated, too large or too narrow for
    training, marks that do not match the images, empty answers, duplicate ids, paths outside the image folder, records
    that are too long, and, with several files (the sides of a split), patients and images that occur in more than one.

    The exit status is 0 without problems, 1 if there are problems in the records, 2 if an option or a whole file cannot
    be used.

    Example: `echoray data check train.jsonl test.jsonl --images pictures/`

    Example: `echoray data check BUSI.json --no-images --json`
    """
    with usable():
        from echovlm_ray.data.check import UNREADABLE

        options = _options(images, no_images, patient_pattern, names, checkpoint, max_tokens)
        report = _run_check(files, options)
    if as_json:
        say_json(report.model_dump_json(indent=2))
    else:
        _print_report(report, findings=True)
    if UNREADABLE in report.found:
        raise typer.Exit(EXIT_USAGE)
    if report.found:
        raise typer.Exit(EXIT_FINDINGS)


def stats_command(
    files: Files,
    images: Images = None,
    with_images: Annotated[bool, typer.Option("--with-images", help="Also decode the images.")] = False,
    patient_pattern: PatientPattern = None,
    as_json: AsJson = False,
) -> None:
    """Counts organs, tasks, languages, patients, images and lengths of answers in a dataset.

    A missing task or language is determined from the question and the answer. Unreadable records are skipped: see
    `echoray data check`.

    Example: `echoray data stats train.jsonl`
    """
    with usable():
        from echovlm_ray.data.check import UNREADABLE

        report = _run_check(files, _options(images, not with_images, patient_pattern, False, None, None))
    if as_json:
        say_json(report.counts.model_dump_json(indent=2))
    else:
        _print_report(report, findings=False)
    unread = report.found.get(UNREADABLE, 0) + report.found.get("broken JSON", 0)
    if unread:
        say(f"{unread} could not be read: see `echoray data check`", err=True)
    if UNREADABLE in report.found:
        raise typer.Exit(EXIT_USAGE)


def split_command(
    file: File,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder for the sides, one file each.")],
    fractions: Annotated[str, typer.Option(help="Sides and their fractions.")] = "train=0.8,validation=0.1,test=0.1",
    by: Annotated[str, typer.Option(help="Records with the same value stay on one side: patient, or id.")] = "patient",
    patient_pattern: PatientPattern = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives another split.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Splits a dataset so that no patient is on two sides. The same seed and records give the same sides.

    The order of the records does not matter. Each side is a JSON Lines file with unchanged records. DIR must not exist,
    or must be empty, because two splits in one folder could mix.

    Example: `echoray data split all.jsonl parts/ --fractions train=0.9,test=0.1 --seed 7`

    Example: `echoray data split liver.json parts/ --patient-pattern '^(volunteer[0-9]+)_'`
    """
    if by not in ("patient", "id"):
        fail(f"--by {by!r} is neither patient nor id", code=EXIT_USAGE)
    with usable():
        from echovlm_ray.checkpoint.atomic import new_folder
        from echovlm_ray.data.dataset import RecordDataset
        from echovlm_ray.data.splitting import parse_fractions, split_records

        parts = parse_fractions(fractions)
        with RecordDataset(file) as dataset:
            divided = split_records(dataset, _grouping(by, patient_pattern), parts, seed)
            with new_folder(directory) as partial:
                for side, indices in divided.items():
                    _write_lines(partial / f"{side}.jsonl", (_raw(dataset, index) for index in indices))
    counts = {side: len(indices) for side, indices in divided.items()}
    if as_json:
        say_json({"by": by, "seed": seed, "records": counts})
    else:
        say(", ".join(f"{side}: {count}" for side, count in counts.items()) + f" records in {directory}")


def convert_command(
    file: File,
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="The file to write, .json or .jsonl. It must not exist.")
    ],
    to: Annotated[str, typer.Option(help="published, swift (messages of ms-swift), or openai (chat).")] = "swift",
    images: Images = None,
    embed: Annotated[
        bool, typer.Option("--embed", help="With openai: embed the images instead of their paths.")
    ] = False,
    extract_to: Annotated[
        Path | None, typer.Option(help="The folder for images that are embedded in the records.")
    ] = None,
    organ: Annotated[str | None, typer.Option(help="The organ of records without one.")] = None,
    task: Annotated[str | None, typer.Option(help="The task of records without one.")] = None,
    language: Annotated[str | None, typer.Option(help="The language of records without one: en or zh.")] = None,
) -> None:
    """Converts records to another format; the input format is detected. Additional fields are kept.

    `published`: id, image, and conversations of system, human and gpt, as published by EchoVLM's authors. `swift`:
    messages with `<image>` marks, and images. `openai`: messages with images as parts. Converting back gives the same
    records. Images with an address (http:, file:) are refused: only files below the image folder are read.

    Example: `echoray data convert BUSI.json busi.jsonl --to swift --organ breast`

    Example: `echoray data convert busi.jsonl back.json --to published`
    """
    from echovlm_ray.tasks import LANGUAGES, TASKS

    if to not in ("published", "swift", "openai"):
        fail(f"--to {to!r} is none of published, swift and openai", code=EXIT_USAGE)
    if embed and to != "openai":
        fail("--embed is for --to openai: the other forms name files", code=EXIT_USAGE)
    if language is not None and language not in LANGUAGES:
        fail("--language must be en or zh", code=EXIT_USAGE)
    if task is not None and task not in TASKS:
        fail(f"--task must be one of {', '.join(TASKS)}", code=EXIT_USAGE)
    given = {"organ": organ, "task": task, "language": language}
    with usable():
        from echovlm_ray.checkpoint.atomic import require_vacant_file
        from echovlm_ray.data.dataset import RecordDataset

        with RecordDataset(file) as dataset:
            require_vacant_file(destination)
            records = _converted(dataset, to, images or file.parent, embed, extract_to, given)
            count = _write_lines(destination, records, as_array=destination.suffix == ".json")
    say(f"{count} records in {destination}, in the form {to}.")


@contextmanager
def usable() -> Iterator[None]:
    """Converts errors to one line and exit status 2."""
    with clear_errors():
        try:
            yield
        except ValueError as error:
            fail(" ".join(str(error).split()), code=EXIT_USAGE)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}", code=EXIT_USAGE)


def _converted(
    dataset: Any, to: Any, root: Path, embed: bool, extract_to: Path | None, given: dict[str, str | None]
) -> Iterator[dict[str, Any]]:
    from dataclasses import replace

    from echovlm_ray.data.convert import extract_embedded, require_paths, to_form
    from echovlm_ray.data.media import ImageRoot

    images = ImageRoot(root) if embed else None
    for index in range(len(dataset)):
        record = dataset[index]
        fill: dict[str, Any] = {
            name: value for name, value in given.items() if value is not None and getattr(record, name) is None
        }
        try:
            found = extract_embedded(replace(record, **fill), extract_to)
            require_paths(found)
            yield to_form(found, to, images)
        except ValueError as error:
            raise ValueError(f"{dataset.place(index)}: {error}") from None


def _raw(dataset: Any, index: int) -> dict[str, Any]:
    (file,) = dataset.files
    raw, _ = file.raw(index)
    assert isinstance(raw, dict)
    return raw


def _write_lines(path: Path, records: Iterator[dict[str, Any]], *, as_array: bool = False) -> int:
    """Writes the records to a temporary file, renames it at the end, and returns their number."""
    import os
    import tempfile

    from echovlm_ray.checkpoint.atomic import naming_file

    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with naming_file(path), os.fdopen(descriptor, "w", encoding="utf-8") as file:
            for record in records:
                lead = ("[\n" if not count else ",\n") if as_array else ""
                file.write(lead + json.dumps(record, ensure_ascii=False) + ("" if as_array else "\n"))
                count += 1
            if as_array:
                file.write("\n]\n" if count else "[]\n")
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(partial, 0o666 & ~mask)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    return count


def _grouping(by: str, pattern: str | None) -> "Grouping":
    from echovlm_ray.data.splitting import Grouping

    try:
        compiled = None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--patient-pattern is no regular expression: {error}") from None
    return Grouping(by, compiled)


def _options(
    images: Path | None,
    no_images: bool,
    pattern: str | None,
    names: bool,
    checkpoint: Path | None,
    max_tokens: int | None,
) -> "CheckOptions":
    from echovlm_ray.config import GatewaySection
    from echovlm_ray.data.check import CheckOptions
    from echovlm_ray.data.media import ImageRoot
    from echovlm_ray.training.recipe import DataSection
    from echovlm_ray.vision.images import ImageLimits
    from echovlm_ray.vision.scaling import usual_scaling

    gateway = GatewaySection()
    limits = ImageLimits(gateway.max_image_bytes, gateway.max_image_pixels, gateway.max_frames, gateway.crop_to_regions)
    if no_images and checkpoint is not None:
        raise ValueError("--checkpoint counts the tokens of images too: leave out --no-images")
    training = DataSection()
    scaling, num_tokens = usual_scaling(training.max_visual_tokens), None
    if checkpoint is not None:
        scaling, num_tokens = _reading_of(checkpoint, limits, training.max_visual_tokens)
    return CheckOptions(
        root=None if no_images else lambda file: ImageRoot(images or file.parent),
        limits=limits,
        scaling=scaling,
        grouping=_grouping("patient", pattern),
        num_tokens=num_tokens,
        max_tokens=training.max_tokens if max_tokens is None else max_tokens,
        show_names=names,
    )


def _reading_of(
    checkpoint: Path, limits: "ImageLimits", max_visual_tokens: int
) -> "tuple[Scaling, Callable[[Record, ImageRoot], int]]":
    """How a checkpoint scales images and counts the tokens of a record."""
    from echovlm_ray.checkpoint.layout import backbone_directory, is_split_folder
    from echovlm_ray.model.configuration import EchoVLMConfig
    from echovlm_ray.model.processing import EchoVLMProcessor
    from echovlm_ray.training.encode import ExampleEncoder
    from echovlm_ray.training.record_source import example_of

    processor = EchoVLMProcessor.from_pretrained(checkpoint)
    config = EchoVLMConfig.from_pretrained(
        backbone_directory(checkpoint) if is_split_folder(checkpoint) else checkpoint
    )
    encoder = ExampleEncoder(processor, config, max_tokens=2**31, max_visual_tokens=max_visual_tokens)

    def count(record: "Record", root: "ImageRoot") -> int:
        return len(encoder.encode(example_of(record, root, limits)))

    return processor.scaling(max_visual_tokens), count


def _run_check(files: list[Path], options: "CheckOptions") -> "CheckReport":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from echovlm_ray.data.check import check

    console = console_of(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking", total=None)
        return check(files, options, lambda done, total: bar.update(task, completed=done, total=total))


def _print_report(report: "CheckReport", *, findings: bool) -> None:
    from rich.text import Text

    from echovlm_ray.cli.tables import Listing

    console = console_of()
    counts = report.counts.model_dump()
    table = Listing("what", "how many", title=f"{counts['records']} records in {len(report.files)} file(s)")
    for name, value in counts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name_of(key)} {number}" for key, number in value.items()) or "-"
        table.add_row(name.replace("_", " "), styled(str(value), ""))
    console.print(table)
    if not findings:
        return
    if not report.found:
        console.print("Nothing is wrong.")
        return
    for finding in report.findings:
        place = f"{finding.file}, line {finding.line}" if finding.line else finding.file
        name = f" ({line(finding.name, MAX_CELL)})" if finding.name else ""
        kind = styled(finding.kind, "bold")
        console.print(Text.assemble(f"{line(place)}{name}: ", kind, f": {line(finding.text)}"), soft_wrap=True)
    listed = len(report.findings)
    total = sum(report.found.values())
    kinds = ", ".join(f"{kind} {count}" for kind, count in report.found.items())
    more = "" if listed >= total else f"; the first {listed} are listed"
    console.print(f"{total} found: {line(kinds)}{more}", soft_wrap=True)
