"""Opens the data of a run: files of records, and what is kept back of them to measure on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import model_validator

from echovlm_ray.config import Section
from echovlm_ray.training.examples import Example, ExampleError, ExampleSource
from echovlm_ray.training.phantom_pool import PhantomPool
from echovlm_ray.training.phantom_source import PhantomSource
from echovlm_ray.training.recipe import DataSection
from echovlm_ray.training.record_source import RecordSource


class DataFiles(Section):
    """Where a run's examples are."""

    # Files of records; none where the recipe has phantoms.
    train: tuple[Path, ...] = ()
    # The folder to which image paths are relative; None: each file's own.
    images: Path | None = None
    # Files of records to measure on; none: a share of the training records.
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
        """See `ExampleSource.example`."""
        return self._source.example(self._indices[index], epoch)

    def place(self, index: int) -> str:
        """See `ExampleSource.place`."""
        return self._source.place(self._indices[index])


def open_sources(
    files: DataFiles, data: DataSection, *, seed: int, phantoms: Path | None = None
) -> tuple[ExampleSource, ExampleSource | None]:
    """What is trained on, and what is measured on, if anything.

    Args:
        files: where the records are.
        data: says how much is kept back where no file to measure on is given. Records are drawn one by one: to keep a
            patient's records together, split them beforehand and give two files. Of phantoms the first are kept back.
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
            return source, RecordSource(files.validation, files.images)
        indices = range(len(source))
        held_out = ChosenSource(source, indices[:kept_back]) if kept_back else None
        return ChosenSource(source, indices[kept_back:]), held_out
    if not files.train:
        raise ExampleError("there is nothing to train on: give files of records, or a recipe with data.phantoms")
    train = RecordSource(files.train, files.images)
    if files.validation:
        return train, RecordSource(files.validation, files.images)
    count = round(validation_share * len(train))
    if not validation_share:
        return train, None
    if not 0 < count < len(train):
        raise ExampleError(
            f"{len(train)} records are too few to keep back a share of {validation_share}: give more, give a file to "
            "measure on, or set data.validation_share to 0"
        )
    order = np.random.default_rng([seed, 1]).permutation(len(train)).tolist()
    return ChosenSource(train, sorted(order[count:])), ChosenSource(train, sorted(order[:count]))
