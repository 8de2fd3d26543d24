"""Reads a YAML file together with the line of every key and value, so that errors can say where."""

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
    """One thing that is wrong with a file.

    Attributes:
        where: file and line, for example "local.yaml:12", or what else the value came from.
        text: the field, what is wrong, and what to do.
    """

    where: str
    text: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.where}: {self.text}"


class DocumentError(ValueError):
    """A file cannot be used; the text has a line for each problem."""

    def __init__(self, problems: list[Problem]) -> None:
        """Takes what is wrong, in the order of the file."""
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


@dataclass(slots=True)
class Document:
    """A file's values, and the line of every key and of every item of a list, by its path."""

    name: str
    values: dict[str, Any]
    lines: dict[KeyPath, str]

    def where(self, path: KeyPath) -> str:
        """Of the field, or of the innermost one around it that the file has."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, self.name)

    def order(self, where: str) -> tuple[str, int]:
        """Sorts places as they come in the file."""
        name, _, line = where.rpartition(":")
        return (name, int(line)) if line.isdecimal() else (where, 0)


class NotYamlError(ValueError):
    """A text is no YAML, or holds a key twice.

    Attributes:
        line: where, counted from 1; None where that is not known.
        reason: what is wrong there.
    """

    def __init__(self, line: int | None, reason: str) -> None:
        super().__init__(reason if line is None else f"line {line}: {reason}")
        self.line = line
        self.reason = reason


def parse_yaml(text: str) -> Any:
    """The value of a text in YAML 1.2, which JSON is too; None for an empty one.

    Raises:
        NotYamlError: it is no YAML, holds several documents, or a key twice.
    """
    return _load(YAML(typ="safe", pure=True), text)


def write_yaml(path: Path, value: Any) -> None:
    """Writes what `parse_yaml` reads back."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment] # declared as None
    yaml.dump(value, path)


def read_document(path: Path, content: str) -> Document:
    """The values of a file; none for an empty one.

    Args:
        path: the file.
        content: what it must hold, for the error; for example "sections such as `gateway:`, one a line".

    Raises:
        DocumentError: it cannot be read, is no YAML, holds something else, or a key twice.
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
        # A date that does not exist.
        raise NotYamlError(None, str(error)) from None


def _note_lines(value: object, path: KeyPath, document: Document, seen: set[int]) -> None:
    # What aliases stand for is noted once: there may be many of them, and one may stand for what it is in.
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
