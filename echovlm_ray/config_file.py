"""Reads a configuration file: YAML in, `Config` out, and errors that name the file, the line and the fix."""

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from echovlm_ray.config import Config
from echovlm_ray.config_checks import ContradictionError
from echovlm_ray.yaml_document import Document, DocumentError, Problem, read_document

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# The minimum similarity of a misspelling to a field's name.
SIMILARITY = 0.6


class ConfigError(DocumentError):
    """A configuration is invalid. The text has a line for each problem."""


def load_config(path: Path | None, overrides: Mapping[str, tuple[Any, str]] | None = None) -> Config:
    """Reads the configuration from a file, or returns the defaults without one.

    Args:
        path: a YAML file; fields that it leaves out keep their defaults.
        overrides: dotted field → value and its source (for example an option's name); they take precedence.

    Raises:
        ConfigError: the file is unreadable or invalid.
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
class _Document(Document):
    """A file's values, with overrides."""

    def set(self, field: str, value: Any, origin: str) -> None:
        path = tuple(field.split("."))
        section = self.values
        for name in path[:-1]:
            inner = section.get(name)
            if not isinstance(inner, dict):
                # The file has another value in place of a section; that problem is reported first.
                if inner is not None:
                    return
                inner = section[name] = {}
            section = inner
        section[path[-1]] = value
        self.lines[path] = origin


def load_system_config(path: Path | None, checkpoint: Path | None) -> Config:
    """Reads the configuration of a system from a command's options: a file, and a checkpoint that overrides the file's.

    Args:
        path: the file; None for the defaults.
        checkpoint: the value of `--checkpoint`; None for the file's.

    Raises:
        ConfigError: as in `load_config`.
    """
    overrides = {} if checkpoint is None else {"model.checkpoint": (str(checkpoint), "--checkpoint")}
    return load_config(path, overrides)


def _read(path: Path) -> _Document:
    try:
        read = read_document(path, "sections such as `gateway:`, one a line")
    except DocumentError as error:
        raise ConfigError(list(error.problems)) from None
    return _Document(read.name, read.values, read.lines)


def _problem(document: _Document, detail: "ErrorDetails") -> Problem:
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ContradictionError):
        paths = [tuple(field.split(".")) for field in cause.fields]
        path = next((path for path in paths if path in document.lines), paths[0])
        return Problem(document.where(path), str(cause))
    path = tuple(str(part) for part in detail["loc"])
    field = ".".join(path)
    if detail["type"] == "extra_forbidden":
        return Problem(document.where(path), f"{field} is unknown; {_suggestion(path)}")
    if detail["type"] == "missing":
        return Problem(document.where(path), f"{field} is missing: add it, or leave its section out")
    if detail["type"] in ("model_type", "dict_type"):
        return Problem(document.where(path), f"{field} is a section: write its fields below it, indented")
    message = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return Problem(document.where(path), f"{field} is {detail['input']!r}; it must be {message}")


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
    section: type[BaseModel] = Config
    for name in path:
        inner = _section_of(section.model_fields[name].annotation) if name in section.model_fields else None
        # The keys of `experts.organs` are organs; the field has the type of its values.
        section = inner or section
    return list(section.model_fields)


def _paths(section: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        yield (*prefix, name)
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from _paths(inner, (*prefix, name))


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section in a field's type: `Resources`, `TLSSection | None`, `dict[str, Resources]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    found = (_section_of(argument) for argument in typing.get_args(annotation))
    return next((section for section in found if section is not None), None)
