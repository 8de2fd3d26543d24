"""Opens the data of a run: files of records, and what is kept back of them to measure on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from echovlm_ray.config import Section
from echovlm_ray.training.examples import Example, ExampleError, ExampleSource
from echovlm_ray.training.records import RecordFile


class DataFiles(Section):
    """Where a run's examples are."""

    # Files of records.
    train: tuple[Path, ...] = Field(min_length=1)
    # The folder to which image paths are relative; None: each file's own.
    images: Path | None = None
    # Files of records to measure on; none: a share of the training records.
    validation: tuple[Path, ...] = ()

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if same := {path.resolve() for path in self.train} & {path.resolve() for path in self.validation}:
            raise ValueError(f"{same.pop()} is both trained on and measured on: give different files")
        return self


class JoinedSource:
    """Several sources one after the other."""

    def __init__(self, sources: Sequence[ExampleSource]) -> None:
        """Takes them in order."""
        self._sources = sources
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        """Of all together."""
        return int(self._ends[-1])

    def example(self, index: int, epoch: int) -> Example:
        """See `ExampleSource.example`."""
        source, inner = self._find(index)
        return source.example(inner, epoch)

    def place(self, index: int) -> str:
        """See `ExampleSource.place`."""
        source, inner = self._find(index)
        return source.place(inner)

    def _find(self, index: int) -> tuple[ExampleSource, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._sources[number], index - (int(self._ends[number - 1]) if number else 0)


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


def open_sources(files: DataFiles, *, validation_share: float, seed: int) -> tuple[ExampleSource, ExampleSource | None]:
    """What is trained on, and what is measured on, if anything.

    Args:
        files: where the records are.
        validation_share: how much is kept back where no file to measure on is given. Records are drawn one by one: to
            keep a patient's records together, split them beforehand and give two files.
        seed: decides which.

    Raises:
        ExampleError: a file cannot be read, or is too small to keep something back.
    """
    train = _join(files.train, files.images)
    if files.validation:
        return train, _join(files.validation, files.images)
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


def _join(paths: Sequence[Path], images: Path | None) -> ExampleSource:
    sources = [RecordFile(path, images) for path in paths]
    return sources[0] if len(sources) == 1 else JoinedSource(sources)
