"""Validates a YAML document with a pydantic model; errors name the file, the line and the fix."""

import difflib
import types
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from echovlm_ray.config_checks import ContradictionError
from echovlm_ray.yaml_document import Document, DocumentError, KeyPath, Problem

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Kind = TypeVar("Kind", bound=BaseModel)

# How like a field's name a misspelling must be to be taken for it.
SIMILARITY = 0.6


def validated(kind: type[Kind], document: Document) -> Kind:
    """The model of a document's values.

    Raises:
        DocumentError: the values cannot be used; a line for each problem.
    """
    try:
        return kind.model_validate(document.values)
    except ValidationError as error:
        details = error.errors(include_url=False)
    # A list whose only item is wrong counts as empty too, which is not what has to be mended.
    places = [detail["loc"] for detail in details]
    problems = {
        _problem(kind, document, detail): None
        for detail, place in zip(details, places, strict=True)
        if not any(other[: len(place)] == place and other != place for other in places)
    }
    raise DocumentError(sorted(problems, key=lambda problem: document.order(problem.where)))


def _problem(kind: type[BaseModel], document: Document, detail: "ErrorDetails") -> Problem:
    path = tuple(str(part) for part in detail["loc"])
    field = ".".join(path)
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ContradictionError):
        named = [(*path, *other.split(".")) for other in cause.fields]
        first = next((other for other in named if other in document.lines), named[0])
        return Problem(document.where(first), ".".join((*path, str(cause))))
    message = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if not path:
        # A rule about several fields: shown at the first of them that it speaks of.
        return Problem(document.where((next((key for key in document.values if key in message), ""),)), message)
    if detail["type"] == "extra_forbidden":
        return Problem(document.where(path), f"{field} is unknown; {_suggestion(kind, path)}")
    if detail["type"] == "missing":
        instead = ", or leave its section out" if len(path) > 1 else ""
        return Problem(document.where(path), f"{field} is missing: add it{instead}")
    if detail["type"] in ("model_type", "dict_type"):
        return Problem(document.where(path), f"{field} is a section: write its fields below it, indented")
    if detail["type"] == "string_pattern_mismatch":
        message = f"of the form {detail['ctx']['pattern']}"
    return Problem(document.where(path), f"{field} is {detail['input']!r}; it must be {message}")


def _suggestion(kind: type[BaseModel], path: KeyPath) -> str:
    known = _fields_of(kind, path[:-1])
    similar = difflib.get_close_matches(path[-1], known, n=1, cutoff=SIMILARITY)
    if similar:
        return f"did you mean {similar[0]}?"
    elsewhere = [".".join(found) for found in _paths(kind) if found[-1] == path[-1]]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"there are {', '.join(known)}"


def _fields_of(section: type[BaseModel], path: KeyPath) -> list[str]:
    for name in path:
        inner = _section_of(section.model_fields[name].annotation) if name in section.model_fields else None
        # Items of a list, and keys such as the organs of `experts.organs`: the field itself gave their type.
        section = inner or section
    return list(section.model_fields)


def _paths(section: type[BaseModel], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    for name, field in section.model_fields.items():
        yield (*prefix, name)
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from _paths(inner, (*prefix, name))


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section in a field's type: `Resources`, `TLSSection | None`, `dict[str, Resources]`, `tuple[Stage, ...]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    found = (_section_of(argument) for argument in typing.get_args(annotation))
    return next((section for section in found if section is not None), None)
