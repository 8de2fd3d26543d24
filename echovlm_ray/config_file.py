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

# How like a field's name a misspelling must be to be taken for it.
SIMILARITY = 0.6


class ConfigError(DocumentError):
    """A configuration cannot be used; the text has a line for each problem."""


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
class _Document(Document):
    """A file's values, over which options may be laid."""

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


def load_system_config(path: Path | None, checkpoint: Path | None) -> Config:
    """The configuration of a system, as commands take it: a file, and a checkpoint that wins over the file's.

    Args:
        path: the file; None: the defaults.
        checkpoint: what `--checkpoint` says; None: the file's own.

    Raises:
        ConfigError: see `load_config`.
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
        # The keys of `experts.organs` are organs, and its values sections: the field itself gave their type.
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
