"""Checks a dataset and collects statistics; every finding has its file, its line and its fix.

Findings quote no contents, because an id or a path may name a patient.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from echovlm_ray.data.dataset import require_different
from echovlm_ray.data.media import ImageRoot, UnusableImageError, check_shape, decode_media_file
from echovlm_ray.data.parse import Problem, parse_record, problems_of
from echovlm_ray.data.phantom.catalogue import UNKNOWN_ATTRIBUTES, UnknownClassError, read_attributes
from echovlm_ray.data.record import InvalidDataError, Record, language_of, task_of
from echovlm_ray.data.source import RecordFile
from echovlm_ray.data.splitting import Grouping
from echovlm_ray.vision.dicom import is_dicom
from echovlm_ray.vision.images import ImageLimits
from echovlm_ray.vision.kinds import VIDEOS, file_kind
from echovlm_ray.vision.scaling import Scaling

# All findings are counted; at most this many of each kind are listed.
LISTED_PER_KIND = 200
# Distinct values that a statistic lists; a file can have as many as records.
NAMES_SHOWN = 40
# The kind of a finding that makes a whole file unusable.
UNREADABLE = "unreadable file"
UNKNOWN, OTHERS = "unknown", "(others)"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class Finding(_Model):
    """One finding of a check.

    Attributes:
        kind: a short name, the same for all of its kind.
        file: the file's path.
        line: from 1; 0 where it concerns a file or several files as a whole.
        text: what is wrong and how to mend it.
        name: the record's id or the image's path, where they were asked for.
    """

    kind: str
    file: str
    line: int
    text: str
    name: str = ""


class Counts(_Model):
    """Statistics of a dataset. `patients` counts distinct ones; `without_patient` counts records without a patient."""

    records: int
    organs: dict[str, int]
    tasks: dict[str, int]
    languages: dict[str, int]
    patients: int
    without_patient: int
    images: int
    videos: int
    images_per_record: dict[str, int]
    answer_characters: dict[str, int]
    with_attributes: int
    image_kinds: dict[str, int]


class CheckReport(_Model):
    """The result of a check: `findings` lists at most `LISTED_PER_KIND` of each kind, `found` counts them all."""

    files: list[str]
    counts: Counts
    found: dict[str, int]
    findings: list[Finding]


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """Options of a check.

    Attributes:
        root: the images' folder; None: images are not checked.
        limits: of one image file.
        scaling: how pictures are scaled for the model; one that cannot be scaled to fit is a finding.
        grouping: how a record's patient is found.
        num_tokens: the length of a record in tokens, as training counts them, to compare with `max_tokens`; raises
            ValueError for what training refuses; None compares nothing.
        show_names: whether findings contain ids and paths.
    """

    root: Callable[[Path], ImageRoot] | None
    limits: ImageLimits
    scaling: Scaling
    grouping: Grouping = field(default_factory=Grouping)
    num_tokens: Callable[[Record, ImageRoot], int] | None = None
    max_tokens: int = 0
    show_names: bool = False


def check(
    paths: Sequence[Path], options: CheckOptions, progress: Callable[[int, int], None] = lambda done, total: None
) -> CheckReport:
    """Reads every record and every image once. Several files are the sides of one split.

    Args:
        paths: JSON or JSON Lines files.
        options: of the check.
        progress: called with how many records are done, and how many there are.

    Raises:
        InvalidDataError: a file is given twice.
        OSError: a file cannot be opened.
    """
    require_different(paths)
    checker = _Checker(options)
    for path in paths:
        try:
            file = RecordFile(path)
        except InvalidDataError as error:
            checker.add(Problem(UNREADABLE, str(error).removeprefix(f"{path} ")), path, 0)
            continue
        with file:
            for line, problem in file.problems:
                checker.add(problem, path, line)
            checker.file(path, file, progress)
    checker.across_files()
    return CheckReport(
        files=[str(path) for path in paths],
        counts=checker.counts.result(),
        found=dict(checker.found.most_common()),
        findings=checker.findings,
    )


@dataclass(slots=True)
class _Tally:
    """Running counts over the records."""

    records: int = 0
    organs: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    patients: set[bytes] = field(default_factory=set)
    without_patient: int = 0
    images: int = 0
    videos: int = 0
    images_per_record: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    with_attributes: int = 0
    image_kinds: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record, patient: str | None) -> None:
        self.records += 1
        self.organs[record.organ or UNKNOWN] += 1
        self.tasks[task_of(record)] += 1
        self.languages[language_of(record)] += 1
        if patient is None:
            self.without_patient += 1
        else:
            self.patients.add(_digest(patient))
        self.images += len(record.images)
        self.videos += len(record.videos)
        self.images_per_record[str(len(record.images) + len(record.videos))] += 1
        self.lengths.append(len(record.target))
        self.with_attributes += record.attributes is not None

    def result(self) -> Counts:
        ordered = sorted(self.lengths)
        last = len(ordered) - 1
        lengths = {name: ordered[round(part * last)] for name, part in _QUANTILES.items()} if ordered else {}
        return Counts(
            records=self.records,
            organs=_shown(self.organs),
            tasks=_shown(self.tasks),
            languages=_shown(self.languages),
            patients=len(self.patients),
            without_patient=self.without_patient,
            images=self.images,
            videos=self.videos,
            images_per_record=_shown(self.images_per_record),
            answer_characters=lengths,
            with_attributes=self.with_attributes,
            image_kinds=_shown(self.image_kinds),
        )


_QUANTILES = {"shortest": 0.0, "median": 0.5, "95 %": 0.95, "longest": 1.0}
Across = Literal["patient", "image"]


@dataclass(frozen=True, slots=True)
class _Image:
    """What is wrong with an image file, if anything; the digest of its content; its kind; whether it is a loop."""

    problem: Problem | None
    digest: bytes = b""
    kind: str = ""
    is_video: bool = False


class _Checker:
    def __init__(self, options: CheckOptions) -> None:
        self._options = options
        self.findings: list[Finding] = []
        self.found: Counter[str] = Counter()
        self.counts = _Tally()
        # Digests instead of names: a huge dataset's names would fill the memory.
        self._ids: dict[bytes, tuple[str, int]] = {}
        self._sides: dict[Across, dict[bytes, set[str]]] = {"patient": defaultdict(set), "image": defaultdict(set)}
        self._images: dict[Path, _Image] = {}

    def add(self, problem: Problem, path: Path, line: int, name: str = "") -> None:
        self.found[problem.kind] += 1
        if self.found[problem.kind] <= LISTED_PER_KIND:
            shown = name if self._options.show_names else ""
            self.findings.append(Finding(kind=problem.kind, file=str(path), line=line, text=problem.text, name=shown))

    def file(self, path: Path, file: RecordFile, progress: Callable[[int, int], None]) -> None:
        root = self._options.root(path) if self._options.root is not None else None
        for index, line, record in self._records(path, file):
            if record is not None:
                patient = self._options.grouping.key(record)
                self.counts.add(record, patient)
                self._identity(record, path, line)
                self._attributes(record, path, line)
                if patient is not None:
                    self._sides["patient"][_digest(patient)].add(str(path))
                if root is not None:
                    self._media(record, root, path, line)
            progress(index + 1, len(file))

    def across_files(self) -> None:
        """Findings about patients and images on more than one side of a split."""
        for what, sides in self._sides.items():
            pairs: Counter[tuple[str, ...]] = Counter(
                tuple(sorted(files)) for files in sides.values() if len(files) > 1
            )
            for files, count in sorted(pairs.items()):
                verb = "occurs" if count == 1 else "occur"
                text = f"{count} {what}{'s' * (count != 1)} {verb} in {' and in '.join(files)}: keep each on one side"
                self.found[f"{what} on both sides"] += count
                self.findings.append(Finding(kind=f"{what} on both sides", file=files[0], line=0, text=text))

    def _records(self, path: Path, file: RecordFile) -> Iterator[tuple[int, int, Record | None]]:
        for index in range(len(file)):
            line = file.line(index)
            raw, problem = file.raw(index)
            if problem is not None:
                self.add(problem, path, line)
                yield index, line, None
                continue
            record, problems = parse_record(raw)
            for found in problems:
                self.add(found, path, line, record.id if record is not None else "")
            yield index, line, record

    def _identity(self, record: Record, path: Path, line: int) -> None:
        first = self._ids.setdefault(_digest(record.id), (str(path), line))
        if first != (str(path), line):
            text = f"has the id of {first[0]}, line {first[1]}: give each record an id of its own"
            self.add(Problem("duplicate id", text), path, line, record.id)

    def _attributes(self, record: Record, path: Path, line: int) -> None:
        if not self._attributes_known(record):
            self.add(Problem("attributes", UNKNOWN_ATTRIBUTES), path, line, record.id)

    def _attributes_known(self, record: Record) -> bool:
        try:
            return record.attributes is None or bool(read_attributes(record.attributes))
        except UnknownClassError:
            return False

    def _media(self, record: Record, root: ImageRoot, path: Path, line: int) -> None:
        sound = True
        media = [("image", name) for name in record.images] + [("video", name) for name in record.videos]
        seen: dict[bytes, str] = {}
        for number, (what, name) in enumerate(media):
            where = f"{what} {number + 1} of {len(media)}"
            image = self._image(root, name)
            if image.problem is not None:
                sound = False
                self.add(Problem(image.problem.kind, f"{where} {image.problem.text}"), path, line, name)
                continue
            self.counts.image_kinds[image.kind] += 1
            self._sides["image"][image.digest].add(str(path))
            if (first := seen.setdefault(image.digest, where)) != where:
                self.add(Problem("repeated image", f"{where} is {first} again: list each once"), path, line, name)
            if what == "video" and not image.is_video:
                self.add(Problem("not a video", f"{where} is a still image: list it under image"), path, line, name)
        if sound and self._options.num_tokens is not None:
            self._length(record, root, path, line)

    def _image(self, root: ImageRoot, name: str) -> _Image:
        """Each file is decoded once, as training does it."""
        try:
            location = root.locate(name)
        except UnusableImageError as error:
            return _Image(Problem(error.kind, str(error)))
        if location not in self._images:
            try:
                content = root.read(name, self._options.limits.max_image_bytes)
                decoded = decode_media_file(content, self._options.limits)
                check_shape(decoded, self._options.scaling)
            except UnusableImageError as error:
                self._images[location] = _Image(Problem(error.kind, str(error)))
            else:
                kind = "DICOM" if is_dicom(content) else file_kind(content)
                assert kind is not None
                shown = f"{kind} cine loop" if decoded.is_video and kind not in VIDEOS else kind
                self._images[location] = _Image(None, hashlib.sha256(content).digest(), shown, decoded.is_video)
        return self._images[location]

    def _length(self, record: Record, root: ImageRoot, path: Path, line: int) -> None:
        assert self._options.num_tokens is not None
        try:
            length = self._options.num_tokens(record, root)
        except ValueError as error:
            # What is wrong with the record itself is named already.
            if not problems_of(record) and self._attributes_known(record):
                self.add(Problem("refused by training", str(error)), path, line, record.id)
            return
        if length > self._options.max_tokens:
            text = f"takes {length} tokens and the limit is {self._options.max_tokens}; a record is never cut"
            self.add(Problem("too long", text), path, line, record.id)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def _shown(counter: Counter[str]) -> dict[str, int]:
    """The most frequent names, the rest added up."""
    shown = dict(counter.most_common(NAMES_SHOWN))
    rest = counter.total() - sum(shown.values())
    return shown | ({OTHERS: rest} if rest else {})
