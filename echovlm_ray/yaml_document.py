"""Reads a YAML file together with the line of every key and value, so that errors can say where."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yaml import Node

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


def read_document(path: Path, content: str) -> Document:
    """The values of a file; none for an empty one.

    Args:
        path: the file.
        content: what it must hold, for the error; for example "sections such as `gateway:`, one a line".

    Raises:
        DocumentError: it cannot be read, is no YAML, holds something else, or a key twice.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise DocumentError([Problem(str(path), f"cannot be read: {reason}")]) from None
    document = Document(str(path), {}, {})
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = str(path) if mark is None else f"{path}:{mark.line + 1}"
        reason = getattr(error, "problem", None) or "cannot be parsed"
        raise DocumentError([Problem(where, f"is no YAML here: {reason}")]) from None
    if values is None:
        return document
    if not isinstance(values, dict):
        raise DocumentError([Problem(f"{path}:1", f"must hold {content}")])
    problems = [
        Problem(f"{path}:{line}", f"{field} occurs twice; the first is in line {first}: keep one of them")
        for field, line, first in _index(root, (), str(path), document.lines)
    ]
    if problems:
        raise DocumentError(problems)
    document.values = values
    return document


def _index(node: "Node | None", path: KeyPath, file: str, lines: dict[KeyPath, str]) -> Iterator[tuple[str, int, int]]:
    """Notes every line; yields keys that occur twice, which YAML would pass over in silence."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            lines[*path, str(number)] = f"{file}:{item.start_mark.line + 1}"
            yield from _index(item, (*path, str(number)), file, lines)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        inner = (*path, name)
        if name in seen:
            yield ".".join(inner), line, seen[name]
        seen[name] = line
        lines[inner] = f"{file}:{line}"
        yield from _index(value, inner, file, lines)
