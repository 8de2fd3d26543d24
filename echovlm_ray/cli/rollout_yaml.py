"""Reads a rollout file: YAML in, `RolloutFile` out, and errors that name the file, the line and the fix."""

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from echovlm_ray.yaml_document import Document, DocumentError, KeyPath, Problem, read_document
from router.rollouts.gates import Gate
from router.rollouts.rollout_file import RolloutFile
from router.rollouts.settings import Step, Thresholds

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Kind = TypeVar("Kind", bound=BaseModel)

# The minimum similarity of a misspelling to a field's name.
SIMILARITY = 0.6


def read_rollout_file(path: Path) -> RolloutFile:
    """Reads a rollout file.

    Raises:
        DocumentError: the file is unreadable or invalid.
    """
    document = read_document(path, "`organ:`, `version:` and what else a rollout needs, one a line")
    return _validated(RolloutFile, document)


class GatesFile(RootModel[tuple[Gate, ...]]):
    """A file with gates, for `canary` and `promote`."""


def read_gates_file(path: Path) -> GatesFile:
    """Reads the gates of a file.

    Raises:
        DocumentError: the file is unreadable or invalid.
    """
    document = read_document(path, "`gates:` with a list of evaluations")
    return GatesFile(_validated(_Gates, document).gates)


class _Gates(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    gates: Annotated[tuple[Gate, ...], Field(min_length=1)]


def _validated(kind: type[Kind], document: Document) -> Kind:
    try:
        return kind.model_validate(document.values)
    except ValidationError as error:
        problems = {_problem(document, detail): None for detail in error.errors(include_url=False)}
        raise DocumentError(sorted(problems, key=lambda problem: document.order(problem.where))) from None


def _problem(document: Document, detail: "ErrorDetails") -> Problem:
    path = tuple(str(part) for part in detail["loc"])
    field = ".".join(path)
    message = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if not path:
        # An error about several fields is reported at the first one that its text names.
        named = next((key for key in document.values if key in message), "")
        return Problem(document.where((named,)), message)
    if detail["type"] == "extra_forbidden":
        return Problem(document.where(path), f"{field} is unknown; {_suggestion(path)}")
    if detail["type"] == "missing":
        return Problem(document.where(path), f"{field} is missing: add it")
    if detail["type"] == "string_pattern_mismatch":
        message = f"of the form {detail['ctx']['pattern']}"
    return Problem(document.where(path), f"{field} is {detail['input']!r}; it must be {message}")


def _suggestion(path: KeyPath) -> str:
    sections: dict[str, type[BaseModel]] = {"steps": Step, "thresholds": Thresholds, "gates": Gate}
    section = sections[path[0]] if len(path) > 1 and path[0] in sections else RolloutFile
    known = list(section.model_fields)
    similar = difflib.get_close_matches(path[-1], known, n=1, cutoff=SIMILARITY)
    return f"did you mean {similar[0]}?" if similar else f"there are {', '.join(known)}"
