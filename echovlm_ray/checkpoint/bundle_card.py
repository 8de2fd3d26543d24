"""The fields of a bundle's manifest that its author provides, from a YAML file and options."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from echovlm_ray.checkpoint.layout import InvalidCheckpointError
from echovlm_ray.yaml_document import NotYamlError, parse_yaml
from experts.bundles.manifest import BundleDescription
from experts.bundles.text import quoted

_MAX_FILE_BYTES = 1_000_000


class BundleCard(BaseModel):
    """The author's fields of a manifest; None for fields that are taken from other sources."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = None
    version: str | None = None
    description: str | None = None
    authors: str | None = None
    license: str | None = None
    copyright: str | None = None
    intended_use: str | None = None
    task: str | None = None
    changelog: dict[str, str] | None = None
    data_source: str | None = None
    training_data: str | None = None
    eval_metrics: dict[str, float] | None = None
    references: tuple[str, ...] | None = None
    organ_synonyms: tuple[str, ...] | None = None

    def over(self, other: "BundleCard") -> "BundleCard":
        """This card, completed by another one; changelogs and metrics are merged."""
        values = other.model_dump(exclude_none=True)
        for field, value in self.model_dump(exclude_none=True).items():
            values[field] = {**values.get(field, {}), **value} if isinstance(value, dict) else value
        return BundleCard(**values)


def read_card(path: Path) -> BundleCard:
    """Reads a card, YAML or JSON (which is YAML).

    Raises:
        InvalidCheckpointError: it is unreadable, not YAML, or has an unknown field.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidCheckpointError(f"{path}: {error.strerror or error}") from None
    if len(content) > _MAX_FILE_BYTES:
        raise InvalidCheckpointError(f"{path}: larger than {_MAX_FILE_BYTES} bytes; this is no card")
    try:
        fields = parse_yaml(content.decode())
    except UnicodeDecodeError:
        raise InvalidCheckpointError(f"{path}: not UTF-8 text") from None
    except NotYamlError as error:
        raise InvalidCheckpointError(f"{path}: not YAML or JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidCheckpointError(f"{path}: must have one field a line, like `authors: the ultrasound group`")
    try:
        return BundleCard.model_validate(fields)
    except ValidationError as error:
        raise InvalidCheckpointError(f"{path}: {_first_reason(error)}") from None


def describe(card: BundleCard, facts: Mapping[str, Any]) -> BundleDescription:
    """Merges the author's fields with those from the weights.

    Raises:
        InvalidCheckpointError: a field is missing or invalid; the text has the fix.
    """
    said = card.model_dump(exclude_none=True)
    needed = [name for name, field in BundleDescription.model_fields.items() if field.is_required()]
    if missing := [name for name in needed if name not in said and name not in facts]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise InvalidCheckpointError(
            f"the manifest needs {', '.join(missing)}: give {options}, or write them into the file of --card"
        )
    try:
        return BundleDescription.model_validate({**said, **facts})
    except ValidationError as error:
        raise InvalidCheckpointError(_first_reason(error)) from None


def _first_reason(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = quoted(".".join(map(str, first["loc"])))
    if first["type"] == "extra_forbidden":
        return f"{field}: is no field of a card; there are {', '.join(BundleCard.model_fields)}"
    return f"{field}: {first['msg'].removeprefix('Value error, ')}"
