"""A corpus of phantoms on disk: picture files, records about them, and a page of facts about the whole."""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from echovlm_ray.checkpoint.atomic import naming_file, require_vacant
from echovlm_ray.data.phantom.dicom_file import dicom_bytes
from echovlm_ray.data.phantom.phantom import NOTICE, ImageArray, Phantom, attributes_at, cine_frames, phantom
from echovlm_ray.data.phantom.records import Record, records
from echovlm_ray.data.phantom.schema import Organ
from echovlm_ray.data.phantom.settings import Settings
from echovlm_ray.data.source import RECORDS_FILE
from echovlm_ray.tasks import Language, TaskName

FileFormat = Literal["png", "dicom", "cine"]
FILE_FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)
FACTS_FILE = "about.json"
_CHUNK = 16


@dataclass(frozen=True, slots=True)
class Corpus:
    """What a corpus holds; the same values give the same bytes.

    Attributes:
        seed: of every random draw.
        indices: of the phantoms; disjoint ranges of one seed share no phantom.
        classes: organ and name of those to draw from, in turns.
        tasks: what is asked about each phantom.
        languages: of questions and answers.
        questions_each: how many questions ("vqa") a phantom and language.
        file_format: still PNG, still DICOM, or a loop as multi-frame DICOM.
        frames: of a loop.
        settings: of the display.
    """

    seed: int
    indices: range
    classes: tuple[tuple[Organ, str], ...]
    tasks: tuple[TaskName, ...] = ("report",)
    languages: tuple[Language, ...] = ("en", "zh")
    questions_each: int = 2
    file_format: FileFormat = "png"
    frames: int = 12
    settings: Settings = field(default_factory=Settings)

    def picture(self, index: int) -> Phantom:
        """The still picture of a phantom as it is displayed."""
        found = phantom(self.seed, index, classes=self.classes)
        return replace(found, image=self.settings.apply(found.image))

    def facts(self) -> dict[str, Any]:
        """What is written beside the records."""
        return {
            "notice": NOTICE,
            "seed": self.seed,
            "first": self.indices.start,
            "count": len(self.indices),
            "classes": [f"{organ}/{name}" for organ, name in self.classes],
            "tasks": list(self.tasks),
            "languages": list(self.languages),
            "format": self.file_format,
            "settings": self.settings.model_dump(),
        }


def write_corpus(
    directory: Path, corpus: Corpus, *, workers: int = 1, progress: Callable[[int], None] = lambda count: None
) -> Mapping[str, int]:
    """Writes pictures, records and facts.

    Args:
        directory: made if it is not there; must be empty.
        corpus: what to write.
        workers: processes.
        progress: called with the number of phantoms finished since the last call.

    Returns:
        Organ and class ("breast/normal") → number of phantoms.

    Raises:
        InvalidCheckpointError: the folder is not empty, or is none.
    """
    require_vacant(directory)
    (directory / "images").mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    separator = "[\n"
    # The records appear under their name when all of them are there.
    unfinished = directory / f"{RECORDS_FILE}.part"
    with naming_file(unfinished), unfinished.open("w", encoding="utf-8") as file:
        for found in _written(directory, corpus, workers):
            counts[f"{found[0]['organ']}/{found[0]['attributes']['class']}"] += 1
            for record in found:
                file.write(separator + json.dumps(record, ensure_ascii=False))
                separator = ",\n"
            progress(1)
        file.write("\n]\n")
    unfinished.rename(directory / RECORDS_FILE)
    facts = {**corpus.facts(), "phantoms": dict(sorted(counts.items()))}
    (directory / FACTS_FILE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return dict(sorted(counts.items()))


def _written(directory: Path, corpus: Corpus, workers: int) -> Iterator[list[Record]]:
    write = partial(_write_one, directory, corpus)
    if workers <= 1:
        yield from map(write, corpus.indices)
        return
    # Forked processes could inherit locks of a threaded caller.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(write, corpus.indices, chunksize=_CHUNK)


def _write_one(directory: Path, corpus: Corpus, index: int) -> list[Record]:
    attributes = attributes_at(corpus.seed, index, corpus.classes)
    assert attributes.organ is not None
    loop = corpus.file_format == "cine"
    if loop:
        frames = [corpus.settings.apply(frame) for frame in cine_frames(attributes, corpus.seed, index, corpus.frames)]
    else:
        frames = [corpus.picture(index).image]
    still = corpus.file_format == "png"
    path = f"images/{index:08d}.{'png' if still else 'dcm'}"
    content = png_bytes(frames[0]) if still else dicom_bytes(frames, attributes.organ, corpus.seed, index)
    (directory / path).write_bytes(content)
    return list(
        records(
            attributes,
            corpus.seed,
            index,
            path=path,
            medium="video" if loop else "image",
            tasks=corpus.tasks,
            languages=corpus.languages,
            questions_each=corpus.questions_each,
        )
    )


def png_bytes(image: ImageArray) -> bytes:
    """A grey PNG that says that it is synthetic."""
    text = PngInfo()
    text.add_text("Description", NOTICE)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def sample(corpus: Corpus, each: int) -> Sequence[tuple[str, list[int]]]:
    """Indices for a contact sheet: the first `each` phantoms of every class, by "organ/class"."""
    found: dict[str, list[int]] = {f"{organ}/{name}": [] for organ, name in corpus.classes}
    for index in corpus.indices:
        attributes = attributes_at(corpus.seed, index, corpus.classes)
        row = found[f"{attributes.organ}/{attributes.class_name}"]
        if len(row) < each:
            row.append(index)
        if all(len(row) == each for row in found.values()):
            break
    return [(name, row) for name, row in found.items() if row]
