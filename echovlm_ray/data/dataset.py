"""A map-style dataset over one or several files, which reads records lazily."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Self

from echovlm_ray.data.parse import Problem, parse_record
from echovlm_ray.data.record import InvalidDataError, Record
from echovlm_ray.data.source import RecordFile


def require_different(paths: Sequence[str | os.PathLike[str]]) -> None:
    """Checks that no file is given twice, also under different paths.

    Raises:
        InvalidDataError: one is.
    """
    seen: set[Path] = set()
    for path in map(Path, paths):
        if (found := path.resolve()) in seen:
            raise InvalidDataError(f"{path} is given twice: give each file once")
        seen.add(found)


class RecordDataset(Sequence[Record]):
    """A map-style dataset with only each record's position in memory; close it, or use it in a `with` statement."""

    def __init__(self, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> None:
        """Opens the files and indexes their records.

        Raises:
            InvalidDataError: a file is empty, truncated, or not UTF-8, or is given twice.
            OSError: a file cannot be opened.
        """
        named = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        require_different(named)
        self.files: list[RecordFile] = []
        try:
            for path in named:
                self.files.append(RecordFile(path))
            for file in self.files:
                for line, problem in file.problems:
                    raise InvalidDataError(f"{file.path}, line {line}: {problem.text}")
        except BaseException:
            self.close()
            raise
        self._ends = list(accumulate(len(file) for file in self.files))

    def __len__(self) -> int:
        """The number of records in all files."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:  # type: ignore[override] # no slices: they would load everything
        """One record.

        Raises:
            IndexError: there is no such record.
            InvalidDataError: it is broken; names its file and line.
        """
        record, problems = self.read(index)
        if problems or record is None:
            raise InvalidDataError(f"{self.place(index)}: {problems[0].text}; see `echoray data check`")
        return record

    def read(self, index: int) -> tuple[Record | None, list[Problem]]:
        """One record, as far as it is readable, and its problems."""
        file, position = self._locate(index)
        raw, problem = file.raw(position)
        return parse_record(raw) if problem is None else (None, [problem])

    def file_of(self, index: int) -> int:
        """The file of a record."""
        return bisect_right(self._ends, index)

    def line(self, index: int) -> int:
        """The first line of a record in its file."""
        file, position = self._locate(index)
        return file.line(position)

    def place(self, index: int) -> str:
        """File and line of a record, for messages."""
        return f"{self.files[self.file_of(index)].path}, line {self.line(index)}"

    def close(self) -> None:
        """Closes the files."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Self:
        """The dataset itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the files."""
        self.close()

    def _locate(self, index: int) -> tuple[RecordFile, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} records, and number {index} is asked for")
        index %= len(self)
        number = self.file_of(index)
        return self.files[number], index - (self._ends[number - 1] if number else 0)
