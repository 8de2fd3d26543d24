"""A file of records, JSON or JSON Lines of any size: the positions are indexed, a record is read when it is needed.

The index takes 24 bytes a record. A file is read in blocks, never mapped into memory: a file that another program
shortens meanwhile gives an error instead of ending the process.
"""

import json
import os
import re
import stat
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from echovlm_ray.data.parse import Problem
from echovlm_ray.data.record import InvalidDataError

# What `echoray data phantom` writes into its folder.
RECORDS_FILE = "records.json"
BLOCK_BYTES = 1024 * 1024
MAX_RECORD_BYTES = 16 * 1024 * 1024
_UTF8_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
_OUTSIDE = re.compile(rb'["\[\]{},\n]')
_INSIDE = re.compile(rb'["\\\n]')
_SPACE = b" \t\r\n"


class RecordFile:
    """Random access to the raw records of one file. Close it, or use it as a context manager.

    Worker processes can read from it at the same time, forked ones and such that get it pickled.

    Attributes:
        path: the file.
        is_lines: whether it is JSON Lines; else it is one JSON array.
        problems: what is wrong with the file as a whole, each with its line.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file and finds its records; reads it once.

        Raises:
            InvalidDataError: it is no regular file, empty, or not UTF-8.
            OSError: it cannot be opened.
        """
        self.path = Path(path)
        self._file = _open(self.path)
        self._stamp = _stamp(self._file)
        self.problems: list[tuple[int, Problem]] = []
        self._starts, self._ends, self._lines = array("Q"), array("Q"), array("Q")
        try:
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise InvalidDataError(f"{self.path} is not a regular file: name a JSON or JSON Lines file")
            start, first = self._beginning()
            self.is_lines = first != b"["
            if self.is_lines:
                self._index_lines(start)
            else:
                _ArrayIndex(self).run(start)
            if not len(self) and not self.problems:
                raise self._empty()
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        """How many records there are, broken ones included."""
        return len(self._starts)

    def line(self, index: int) -> int:
        """The line in the file at which a record begins, from 1."""
        return self._lines[index]

    def raw(self, index: int) -> tuple[object, Problem | None]:
        """One record as JSON has it, or what is wrong with its text."""
        start, end = self._starts[index], self._ends[index]
        if end - start > MAX_RECORD_BYTES:
            return None, Problem("too large", f"has {end - start} bytes and the limit is {MAX_RECORD_BYTES}")
        # Forked processes share one position in the file, so none is set here.
        content = os.pread(self._file.fileno(), end - start, start)
        if len(content) < end - start:
            return None, Problem("broken JSON", "the file became shorter while it was read")
        return _decode(content, self._lines[index])

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        """The file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open file."""
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Opens the file again.

        Raises:
            InvalidDataError: it is not the one that was indexed.
            OSError: it cannot be opened.
        """
        vars(self).update(state)
        self._file = _open(self.path)
        if _stamp(self._file) != self._stamp:
            self._file.close()
            raise InvalidDataError(f"{self.path} was changed while it was in use: begin again with the file as it is")

    def add(self, start: int, end: int, line: int) -> None:
        """Records where a record lies; for the scanners of this module."""
        self._starts.append(start)
        self._ends.append(end)
        self._lines.append(line)

    def blocks(self, start: int) -> Iterator[tuple[int, bytes]]:
        """The file from an offset on, block by block, each with its own offset."""
        self._file.seek(start)
        while block := self._file.read(BLOCK_BYTES):
            yield start, block
            start += len(block)

    def _beginning(self) -> tuple[int, bytes]:
        """Where the text starts, and its first character."""
        head = self._file.read(4) or b""
        if not head.startswith(_UTF8_BOM) and head.startswith(_OTHER_BOMS):
            raise InvalidDataError(f"{self.path} is UTF-16 or UTF-32: save it as UTF-8")
        start = len(_UTF8_BOM) if head.startswith(_UTF8_BOM) else 0
        for offset, block in self.blocks(start):
            rest = block.lstrip(_SPACE)
            if rest:
                return start, rest[:1]
            assert offset >= start
        raise self._empty()

    def _empty(self) -> InvalidDataError:
        return InvalidDataError(f"{self.path} is empty: a dataset has at least one record")

    def _index_lines(self, start: int) -> None:
        line, begin, blank = 1, start, True
        for offset, block in self.blocks(start):
            position = 0
            while (found := block.find(b"\n", position)) >= 0:
                if not (blank and not block[position:found].strip(_SPACE)):
                    self.add(begin, offset + found, line)
                line, begin, blank, position = line + 1, offset + found + 1, True, found + 1
            blank = blank and not block[position:].strip(_SPACE)
        end = offset + len(block)
        if not blank:
            self.add(begin, end, line)


def _open(path: Path) -> BinaryIO:
    if path.is_dir():
        written = path / RECORDS_FILE
        hint = str(written) if written.is_file() else "a JSON or JSON Lines file"
        raise InvalidDataError(f"{path} is a folder: name the file with the records, {hint}")
    # Without O_NONBLOCK a named pipe would wait for a writer forever.
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)


def _stamp(file: BinaryIO) -> tuple[int, int]:
    """Size and time of the last change."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


class _ArrayIndex:
    """Finds the elements of one JSON array without parsing them."""

    def __init__(self, file: RecordFile) -> None:
        self._file = file
        self._depth = 0
        self._line = 1
        # Where the element that is being read begins, and the line of its first character.
        self._begin = 0
        self._begin_line = 0
        self._in_string = self._escaped = self._ended = False

    def run(self, start: int) -> None:
        end = start
        for offset, block in self._file.blocks(start):
            self._block(offset, block)
            end = offset + len(block)
        if not self._ended:
            text = "the file ends in the middle of the array: it is truncated"
            self._file.problems.append((self._line, Problem("broken JSON", text)))
        assert end > start

    def _block(self, offset: int, block: bytes) -> None:
        position = 0
        if self._escaped:
            position, self._escaped = 1, False
        while position < len(block):
            if self._ended:
                self._after_end(block[position:])
                return
            found = (_INSIDE if self._in_string else _OUTSIDE).search(block, position)
            if found is None:
                self._content(block[position:])
                return
            self._content(block[position : found.start()])
            position = found.end()
            mark = found.group()
            if mark == b"\\":
                self._escaped = position == len(block)
                position += 1
            else:
                self._mark(mark, offset + found.start())

    def _content(self, between: bytes) -> None:
        if not self._begin_line and between.strip(_SPACE):
            self._begin_line = self._line

    def _mark(self, mark: bytes, place: int) -> None:
        if mark == b"\n":
            self._line += 1
            return
        if mark == b'"':
            self._in_string = not self._in_string
        elif not self._in_string and mark in b"[{":
            self._depth += 1
            if self._depth == 1:
                self._begin = place + 1
                return
        elif not self._in_string and mark in b"]}":
            self._depth -= 1
            if not self._depth:
                self._ended = True
                if self._begin_line or len(self._file):
                    self._finish(place)
                return
        elif mark == b"," and self._depth == 1 and not self._in_string:
            self._finish(place)
            self._begin = place + 1
            return
        self._begin_line = self._begin_line or self._line

    def _finish(self, place: int) -> None:
        self._file.add(self._begin, place, self._begin_line or self._line)
        self._begin_line = 0

    def _after_end(self, rest: bytes) -> None:
        if rest.strip(_SPACE) and not self._file.problems:
            line = self._line + rest[: len(rest) - len(rest.lstrip(_SPACE))].count(b"\n")
            text = "something follows the end of the array: for JSON Lines, write one object a line without brackets"
            self._file.problems.append((line, Problem("broken JSON", text)))


def _decode(content: bytes, line: int) -> tuple[object, Problem | None]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        at = line + content[: error.start].lstrip(_SPACE).count(b"\n")
        return None, Problem("not UTF-8", f"line {at} is not UTF-8: save the file as UTF-8")
    try:
        return json.loads(text.strip(), parse_constant=_refuse, object_pairs_hook=_object), None
    except json.JSONDecodeError as error:
        return None, Problem("broken JSON", f"line {line + error.lineno - 1}, column {error.colno}: {error.msg}")
    except _RepeatedFieldError:
        return None, Problem("broken JSON", "an object has the same field twice, so one of them would be lost")
    except RecursionError:
        return None, Problem("nested too deep", "is nested too deep to be read: flatten it")
    except ValueError:
        # NaN, or a number of thousands of digits, which Python refuses.
        return None, Problem("broken JSON", "holds a number that JSON does not allow (NaN, Infinity), or a huge one")


class _RepeatedFieldError(ValueError):
    pass


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedFieldError
    return found


def _refuse(constant: str) -> object:
    raise ValueError(constant)
