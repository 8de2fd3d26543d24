"""Reads a configuration file: YAML in, `Config` out, and errors that name the file, the line and the fix."""

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from echovlm_ray.config import Config, ContradictionError, Section

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from yaml import Node

# How like a field's name a misspelling must be to be taken for it.
SIMILARITY = 0.6


@dataclass(frozen=True, slots=True)
class ConfigProblem:
    """One thing that is wrong with a configuration.

    Attributes:
        where: file and line, for example "local.yaml:12", or what else the value came from.
        text: the field, what is wrong, and what to do.
    """

    where: str
    text: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.where}: {self.text}"


class ConfigError(ValueError):
    """A configuration cannot be used; the text has a line for each problem."""

    def __init__(self, problems: list[ConfigProblem]) -> None:
        """Takes what is wrong, in the order of the file."""
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


def load_config(path: Path | None, overrides: Mapping[str, tuple[Any, str]] | None = None) -> Config:
    """The configuration of a file, or the defaults without one.

    Args:
        path: a YAML file; fields that it leaves out keep their defaults.
        overrides: dotted field → value and where it came from (for example an option's name); they win.

    Raises:
        ConfigError: the file cannot be read, or its contents cannot be used.
    """
    document = _Document("the configuration", {}, {})
    if path is not None:
        document = _read(path)
    for field, (value, origin) in (overrides or {}).items():
        document.set(field, value, origin)
    try:
        return Config.model_validate(document.values)
    except ValidationError as error:
        problems = {_problem(document, detail): None for detail in error.errors(include_url=False)}
        raise ConfigError(sorted(problems, key=lambda problem: document.order(problem.where))) from None


@dataclass(slots=True)
class _Document:
    """A file's values, and the line of every key and value by its path."""

    name: str
    values: dict[str, Any]
    lines: dict[tuple[str, ...], str]

    def set(self, field: str, value: Any, origin: str) -> None:
        path = tuple(field.split("."))
        section = self.values
        for name in path[:-1]:
            inner = section.get(name)
            if not isinstance(inner, dict):
                # Something else than a section stands in the file; that is the problem to report first.
                if inner is not None:
                    return
                inner = section[name] = {}
            section = inner
        section[path[-1]] = value
        self.lines[path] = origin

    def where(self, path: tuple[str, ...]) -> str:
        """Of the field, or of the innermost section around it that the file has."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, self.name)

    def order(self, where: str) -> tuple[str, int]:
        name, _, line = where.rpartition(":")
        return (name, int(line)) if line.isdecimal() else (where, 0)


def _read(path: Path) -> _Document:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise ConfigError([ConfigProblem(str(path), f"cannot be read: {reason}")]) from None
    document = _Document(str(path), {}, {})
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = str(path) if mark is None else f"{path}:{mark.line + 1}"
        reason = getattr(error, "problem", None) or "cannot be parsed"
        raise ConfigError([ConfigProblem(where, f"is no YAML here: {reason}")]) from None
    if values is None:
        return document
    if not isinstance(values, dict):
        raise ConfigError([ConfigProblem(f"{path}:1", "must hold sections such as `gateway:`, one a line")])
    problems = [
        ConfigProblem(f"{path}:{line}", f"{field} occurs twice; the first is in line {first}: keep one of them")
        for field, line, first in _index(root, (), str(path), document.lines)
    ]
    if problems:
        raise ConfigError(problems)
    document.values = values
    return document


def _index(
    node: "Node | None", path: tuple[str, ...], file: str, lines: dict[tuple[str, ...], str]
) -> Iterator[tuple[str, int, int]]:
    """Notes every key's line; yields keys that occur twice, which YAML would pass over in silence."""
    import yaml

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


def _problem(document: _Document, detail: "ErrorDetails") -> ConfigProblem:
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ContradictionError):
        paths = [tuple(field.split(".")) for field in cause.fields]
        path = next((path for path in paths if path in document.lines), paths[0])
        return ConfigProblem(document.where(path), str(cause))
    path = tuple(str(part) for part in detail["loc"])
    field = ".".join(path)
    if detail["type"] == "extra_forbidden":
        return ConfigProblem(document.where(path), f"{field} is unknown; {_suggestion(path)}")
    if detail["type"] == "missing":
        return ConfigProblem(document.where(path), f"{field} is missing: add it, or leave its section out")
    if detail["type"] in ("model_type", "dict_type"):
        return ConfigProblem(document.where(path), f"{field} is a section: write its fields below it, indented")
    message = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return ConfigProblem(document.where(path), f"{field} is {detail['input']!r}; it must be {message}")


def _suggestion(path: tuple[str, ...]) -> str:
    known = _fields_of(path[:-1])
    similar = difflib.get_close_matches(path[-1], known, n=1, cutoff=SIMILARITY)
    if similar:
        return f"did you mean {similar[0]}?"
    elsewhere = [".".join(found) for found in _paths(Config) if found[-1] == path[-1]]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"there are {', '.join(known)}"


def _fields_of(path: tuple[str, ...]) -> list[str]:
    section: type[Section] = Config
    for name in path:
        inner = _section_of(section.model_fields[name].annotation) if name in section.model_fields else None
        # The keys of `experts.organs` are organs, and its values sections: the field itself gave their type.
        section = inner or section
    return list(section.model_fields)


def _paths(section: type[Section], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        yield (*prefix, name)
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from _paths(inner, (*prefix, name))


def _section_of(annotation: Any) -> type[Section] | None:
    """The section in a field's type: `Resources`, `TLSSection | None`, `dict[str, Resources]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, Section) else None
    found = (_section_of(argument) for argument in typing.get_args(annotation))
    return next((section for section in found if section is not None), None)
