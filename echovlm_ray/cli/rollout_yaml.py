"""Reads a rollout file: YAML in, `RolloutFile` out, and errors that name the file, the line and the fix."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, RootModel

from echovlm_ray.document_validation import validated
from echovlm_ray.yaml_document import read_document
from router.rollouts.gates import Gate
from router.rollouts.rollout_file import RolloutFile


def read_rollout_file(path: Path) -> RolloutFile:
    """Reads a rollout file.

    Raises:
        DocumentError: the file is unreadable or invalid.
    """
    document = read_document(path, "`organ:`, `version:` and what else a rollout needs, one a line")
    return validated(RolloutFile, document)


class GatesFile(RootModel[tuple[Gate, ...]]):
    """A file with gates, for `canary` and `promote`."""


def read_gates_file(path: Path) -> GatesFile:
    """Reads the gates of a file.

    Raises:
        DocumentError: the file is unreadable or invalid.
    """
    document = read_document(path, "`gates:` with a list of evaluations")
    return GatesFile(validated(_Gates, document).gates)


class _Gates(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    gates: Annotated[tuple[Gate, ...], Field(min_length=1)]
