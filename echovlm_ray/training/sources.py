"""Opens the data of a run: training records, and held-out records for validation."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import model_validator

from echovlm_ray.config import Section
from echovlm_ray.data.record import InvalidDataError
from echovlm_ray.data.splitting import split_groups
from echovlm_ray.training.examples import Example, ExampleError, ExampleSource
from echovlm_ray.training.phantom_pool import PhantomPool
from echovlm_ray.training.phantom_source import PhantomSource
from echovlm_ray.training.recipe import DataSection
from echovlm_ray.training.record_source import PATIENT, RecordSource

NONE_KEPT = "No record was kept back."


class DataFiles(Section):
    """Where a run's examples are."""

    # Files of records; none where the recipe has phantoms.
    train: tuple[Path, ...] = ()
    # The folder to which image paths are relative; None: each file's own.
    images: Path | None = None
    # Files of validation records; if empty, a share of the training records.
    validation: tuple[Path, ...] = ()

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if same := {path.resolve() for path in self.train} & {path.resolve() for path in self.validation}:
            raise ValueError(f"{same.pop()} is both trained on and measured on: give different files")
        return self


class ChosenSource:
    """Some examples of a source, in the order given."""

    def __init__(self, source: ExampleSource, indices: Sequence[int]) -> None:
        """Takes the source and the indices of what is chosen."""
        self._source = source
        self._indices = list(indices)

    def __len__(self) -> int:
        """How many are chosen."""
        return len(self._indices)

    def example(self, index: int, epoch: int) -> Example:
        return self._source.example(self._indices[index], epoch)

    def place(self, index: int) -> str:
        return self._source.place(self._indices[index])


class Sources(NamedTuple):
    """The training data, the validation data if any, and a description of the split."""

    train: ExampleSource
    held_out: ExampleSource | None
    division: str


def open_sources(files: DataFiles, data: DataSection, *, seed: int, phantoms: Path | None = None) -> Sources:
    """Opens the training and the validation data.

    Args:
        files: where the records are.
        data: says how much is kept back where no file to measure on is given. Records are divided as `echoray data
            split` does it: a patient's stay together; a record that names none stands for itself, by its id. Of
            phantoms the first are kept back.
        seed: decides which.
        phantoms: the folder of the pool, where the recipe has phantoms.

    Raises:
        ExampleError: a file cannot be read, or is too small to keep something back.
    """
    validation_share = data.validation_share
    if data.phantoms is not None:
        assert phantoms is not None
        source = PhantomSource(PhantomPool.open(phantoms, data.phantoms))
        kept_back = round(validation_share * data.phantoms.pictures) * data.phantoms.examples_each
        if files.validation:
            return _given(source, files)
        indices = range(len(source))
        held_out = ChosenSource(source, indices[:kept_back]) if kept_back else None
        division = f"{kept_back} examples of the first phantoms were kept back; no picture is on both sides."
        return Sources(ChosenSource(source, indices[kept_back:]), held_out, division if kept_back else NONE_KEPT)
    if not files.train:
        raise ExampleError("there is nothing to train on: give files of records, or a recipe with data.phantoms")
    train = RecordSource(files.train, files.images)
    if files.validation:
        return _given(train, files)
    if not validation_share:
        return Sources(train, None, NONE_KEPT)
    return _divided(train, validation_share, seed)


def require_files(files: DataFiles, data: DataSection, *, seed: int) -> None:
    """Checks before a run begins that its files of records can be read and divided.

    Raises:
        ExampleError: see `open_sources`.
    """
    if data.phantoms is None:
        open_sources(files, data, seed=seed)
    elif files.validation:
        RecordSource(files.validation, files.images)


def _given(train: ExampleSource, files: DataFiles) -> Sources:
    held_out = RecordSource(files.validation, files.images)
    return Sources(train, held_out, f"{len(held_out)} records of files of their own were measured on.")


def _divided(source: RecordSource, share: float, seed: int) -> Sources:
    """Holds out a share of the records: whole patients, if records have them."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index in range(len(source)):
        groups[source.group(index)].append(index)
    # Names in one mapping of texts, without a patient ever being taken for an id.
    named = {f"{kind} {name}": indices for (kind, name), indices in groups.items()}
    try:
        sides = split_groups(
            {name: len(indices) for name, indices in named.items()}, {"train": 1 - share, "held out": share}, seed
        )
    except InvalidDataError:
        raise ExampleError(
            f"{len(source)} records in {len(groups)} groups (a patient's stay together) are too few to keep back a "
            f"share of {share}: give more, give a file to measure on, or set data.validation_share to 0"
        ) from None
    chosen = {
        side: sorted(chain(*(named[name] for name in named if sides[name] == side))) for side in set(sides.values())
    }
    train, held_out = chosen["train"], chosen["held out"]
    division = f"{len(held_out)} of {len(source)} records were kept back"
    patients = sum(kind == PATIENT for kind, _ in groups)
    single = sum(len(indices) for (kind, _), indices in groups.items() if kind != PATIENT)
    if patients:
        division += ", divided by patient: no patient is on both sides"
    if single:
        division += f"; {single} records name no patient and were divided by id" if patients else ", divided by id"
        division += ", so images of one patient can be on both sides"
    return Sources(ChosenSource(source, train), ChosenSource(source, held_out), division + ".")
