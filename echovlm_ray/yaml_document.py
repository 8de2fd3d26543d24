"""Reads a YAML file with the line numbers of all keys and values, for errors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

KeyPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a file.

    Attributes:
        where: file and line, for example "local.yaml:12", or another source of the value.
        text: the field, the problem and the fix.
    """

    where: str
    text: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.where}: {self.text}"


class DocumentError(ValueError):
    """A file is invalid. The text has a line for each problem."""

    def __init__(self, problems: list[Problem]) -> None:
        """Takes the problems in the order of the file."""
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


@dataclass(slots=True)
class Document:
    """A file's values, and the line of every key and of every item of a list, by its path."""

    name: str
    values: dict[str, Any]
    lines: dict[KeyPath, str]

    def where(self, path: KeyPath) -> str:
        """The location of a field, or of the innermost enclosing one in the file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, self.name)

    def order(self, where: str) -> tuple[str, int]:
        """The sort key of a location in the file."""
        name, _, line = where.rpartition(":")
        return (name, int(line)) if line.isdecimal() else (where, 0)


class NotYamlError(ValueError):
    """A text is not YAML, or has a duplicate key.

    Attributes:
        line: the line, from 1; None if it is unknown.
        reason: the problem.
    """

    def __init__(self, line: int | None, reason: str) -> None:
        super().__init__(reason if line is None else f"line {line}: {reason}")
        self.line = line
        self.reason = reason


def parse_yaml(text: str) -> Any:
    """Parses YAML 1.2, of which JSON is a subset; None for an empty text.

    Raises:
        NotYamlError: it is not YAML, or has several documents or a duplicate key.
    """
    return _load(YAML(typ="safe", pure=True), text)


def write_yaml(path: Path, value: Any) -> None:
    """Writes what `parse_yaml` reads back."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment] # declared as None
    yaml.dump(value, path)


def read_document(path: Path, content: str) -> Document:
    """Reads the values of a file; empty for an empty file.

    Args:
        path: the file.
        content: the expected content, for errors; for example "sections such as `gateway:`, one a line".

    Raises:
        DocumentError: it is unreadable, not YAML, not a mapping, or has a duplicate key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise DocumentError([Problem(str(path), f"cannot be read: {reason}")]) from None
    document = Document(str(path), {}, {})
    try:
        values = parse_yaml(text)
        with_lines = _load(YAML(pure=True), text)
    except NotYamlError as error:
        where = str(path) if error.line is None else f"{path}:{error.line}"
        raise DocumentError([Problem(where, f"is no YAML here: {error.reason}")]) from None
    if values is None:
        return document
    if not isinstance(values, dict):
        raise DocumentError([Problem(f"{path}:1", f"must hold {content}")])
    document.values = values
    _note_lines(with_lines, (), document, set())
    return document


def _load(yaml: YAML, text: str) -> Any:
    try:
        return yaml.load(text)
    except DuplicateKeyError as error:
        key = error.problem.partition('"')[2].partition('"')[0]
        raise NotYamlError(error.problem_mark.line + 1, f"{key} occurs twice: keep one of them") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error)
        raise NotYamlError(None if mark is None else mark.line + 1, reason) from None
    except RecursionError:
        raise NotYamlError(None, "it is nested too deeply") from None
    except ValueError as error:
        # An invalid date.
        raise NotYamlError(None, str(error)) from None


def _note_lines(value: object, path: KeyPath, document: Document, seen: set[int]) -> None:
    # The target of aliases is visited once: there may be many of them, and they may be recursive.
    if id(value) in seen:
        return
    seen.add(id(value))
    children: dict[str, tuple[int, object]] = {}
    if isinstance(value, CommentedMap):
        children = {str(key): (value.lc.key(key)[0], child) for key, child in value.items() if key in value.lc.data}
    elif isinstance(value, CommentedSeq):
        children = {str(index): (value.lc.item(index)[0], child) for index, child in enumerate(value)}
    for name, (line, child) in children.items():
        document.lines[*path, name] = f"{document.name}:{line + 1}"
        _note_lines(child, (*path, name), document, seen)
