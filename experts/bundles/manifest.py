"""The manifest of a bundle. Its digest is the version's identity.

These keys have the meaning of a MONAI bundle's metadata (https://docs.monai.io/en/stable/mb_specification.html):
version, changelog, task, description, authors, copyright, data_source, intended_use, references, eval_metrics.
"""

import json
import re
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from experts.bundles.digest import digest_of
from experts.bundles.text import Line, Prose, quoted
from experts.errors import InvalidBundleError

if TYPE_CHECKING:
    import torch

MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
# A longer list of invalid fields does not help, and an attacker would control its length.
_SHOWN_REASONS = 5
_SHOWN_CHARACTERS = 200

DTypeName = Literal["float32", "bfloat16", "float16"]
# What happens to a bundle of another dtype than the backbone's.
OtherDtype = Literal["convert", "refuse"]
Projection = Literal["gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")

# The regular expression of https://semver.org.
_SEMANTIC_VERSION = re.compile(
    r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
    r"(?:-((?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(?:\.(?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*))?"
    r"(?:\+([0-9a-zA-Z-]+(?:\.[0-9a-zA-Z-]+)*))?",
    re.ASCII,
)


def check_version(version: str) -> str:
    """Returns a valid semantic version.

    Raises:
        ValueError: it is not MAJOR.MINOR.PATCH with optional -prerelease and +build.
    """
    if not _SEMANTIC_VERSION.fullmatch(version) or len(version) > 100:
        raise ValueError(f"{version[:100]!r} is no semantic version; write one like 1.4.0 or 2.0.0-rc.1")
    return version


def version_key(version: str) -> tuple[tuple[int, int, int], bool, tuple[tuple[bool, int, str], ...], str]:
    """The sort key of a version by semver.org's order; builds of one version are ordered by their text."""
    match = _SEMANTIC_VERSION.fullmatch(check_version(version))
    assert match is not None
    major, minor, patch, prerelease, build = match.groups()
    parts = tuple(
        (not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in (prerelease or "").split(".")
    )
    return (int(major), int(minor), int(patch)), prerelease is None, parts, build or ""


def check_organ(organ: str) -> str:
    """Returns an organ's name that is valid for a folder and an application.

    Raises:
        ValueError: it is not lower-case letters, digits and hyphens, starting with a letter.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,39}", organ):
        raise ValueError(f"organ {organ[:100]!r} must be lower-case letters, digits and hyphens, like 'breast'")
    return organ


def check_file_path(path: str) -> str:
    """Returns the path if it names a safetensors file in the manifest's folder.

    Raises:
        ValueError: it could lead to another folder, or is not a safetensors file.
    """
    shown = repr(path[:200])
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        raise ValueError(f"path {shown} is absolute; a bundle's files are in its manifest's folder")
    if "\\" in path:
        raise ValueError(f"path {shown} has a backslash")
    if ".." in path.split("/"):
        raise ValueError(f"path {shown} leaves the bundle")
    if "/" in path:
        raise ValueError(f"path {shown} names a subfolder; a bundle's files are in its manifest's folder")
    if path.startswith("."):
        raise ValueError(f"path {shown} is hidden")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,150}", path):
        raise ValueError(f"path {shown} must be letters, digits, '.', '_' and '-', at most 150 of them")
    if not path.endswith(".safetensors"):
        raise ValueError(f"path {shown} is not a .safetensors file; bundles hold nothing else")
    return path


Version = Annotated[str, AfterValidator(check_version)]
Organ = Annotated[str, AfterValidator(check_organ)]
FilePath = Annotated[str, AfterValidator(check_file_path)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, lt=2**31)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(_Frozen):
    """One file of a bundle."""

    path: FilePath
    sha256: Digest
    # Bytes.
    size: Annotated[int, Field(ge=0, lt=2**63)]


class ProbeSizes(_Frozen):
    """The sizes of a bundle's self-test in every layer; see `experts.bundles.probe`."""

    tokens: Annotated[int, Field(ge=1, le=4096)]
    top_k: Annotated[int, Field(ge=1, le=64)]


class BundleDescription(_Frozen):
    """The manifest without its list of files: the fields that the author of a bundle provides."""

    name: Annotated[Line, Field(min_length=1, max_length=200)]
    organ: Organ
    version: Version
    description: Prose
    authors: Prose
    # An SPDX identifier, for example "Apache-2.0".
    license: Line
    copyright: Prose = ""
    intended_use: Prose
    task: Line = "Routed experts of EchoVLM for ultrasound of one organ"
    # What changed, by version.
    changelog: dict[Version, Prose] = {}
    data_source: Prose = ""
    # The training data, as a description without any patient's data.
    training_data: Prose = ""
    eval_metrics: dict[Line, float] = {}
    references: tuple[Line, ...] = ()
    # Synonyms of the organ in any language, for hints of requests and DICOM attributes.
    organ_synonyms: tuple[Line, ...] = ()

    # The backbone that it was trained against, and the only one that it works with.
    backbone_digest: Digest
    num_layers: Size
    num_experts: Size
    hidden_size: Size
    # The experts' intermediate size.
    intermediate_size: Size
    dtype: DTypeName
    # The gate rows' dtype, if it differs from the experts'.
    gate_dtype: DTypeName | None = None
    # The experts' indices in the checkpoint that it was split from, in order; None if it was not split from one.
    source_experts: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    # Whether there is a prototype: the mean vision feature [hidden_size] of this organ's images.
    has_prototype: bool = False
    # The sizes of the recorded self-test; None without one.
    probe: ProbeSizes | None = None

    @model_validator(mode="after")
    def _source_experts_fit(self) -> Self:
        if self.source_experts is not None:
            if len(self.source_experts) != self.num_experts:
                raise ValueError(
                    f"source_experts names {len(self.source_experts)} experts, but num_experts is {self.num_experts}"
                )
            if len(set(self.source_experts)) < self.num_experts:
                raise ValueError("source_experts names an expert twice")
        return self

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The experts' element type."""
        return _torch_dtype(self.dtype)

    @property
    def gate_torch_dtype(self) -> "torch.dtype":
        """The gate rows' element type."""
        return _torch_dtype(self.gate_dtype or self.dtype)

    @property
    def num_expert_parameters(self) -> int:
        """The number of parameters of all experts in all layers."""
        return self.num_layers * self.num_experts * 3 * self.hidden_size * self.intermediate_size

    def expert_shape(self, projection: Projection) -> tuple[int, int]:
        """The shape of one expert's matrix."""
        if projection == "down":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size


class Manifest(BundleDescription):
    """A bundle's manifest."""

    format: Literal["echovlm-experts-1"]
    files: Annotated[tuple[FileEntry, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _files_are_distinct(self) -> Self:
        # Names must not differ only by case, because some file systems ignore it.
        paths = [entry.path.lower() for entry in self.files]
        if repeated := sorted({path for path in paths if paths.count(path) > 1}):
            raise ValueError(f"files names {', '.join(repeated)} twice")
        return self

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical form of `to_json`."""
        return digest_of(self._content())

    @property
    def size_bytes(self) -> int:
        """The bytes of all files."""
        return sum(entry.size for entry in self.files)

    def to_json(self) -> bytes:
        """The content of manifest.json, formatted for people. Fields at their default are omitted."""
        return (json.dumps(self._content(), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()

    def _content(self) -> dict[str, Any]:
        # Without defaults, so that a new field does not change the identity of existing bundles.
        return self.model_dump(mode="json", exclude_defaults=True)

    @classmethod
    def from_json(cls, content: bytes, where: str) -> Self:
        """Parses a manifest.json.

        Args:
            content: its bytes.
            where: its name in errors.

        Raises:
            InvalidBundleError: it is too large, not JSON, has a duplicate key, or is not a manifest; the text names the
                first invalid fields.
        """
        if len(content) > MAX_MANIFEST_BYTES:
            raise InvalidBundleError(f"{where}: is larger than {MAX_MANIFEST_BYTES} bytes")
        try:
            # Of two equal keys pydantic takes the last, and other readers the first.
            json.loads(content, object_pairs_hook=_refuse_repetition)
            return cls.model_validate_json(content)
        except ValidationError as error:
            raise InvalidBundleError(f"{where}: {_reasons(error)}") from error
        except (ValueError, RecursionError) as error:
            raise InvalidBundleError(f"{where}: is not JSON: {str(error)[:_SHOWN_CHARACTERS]}") from error


def _refuse_repetition(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key {key[:_SHOWN_CHARACTERS]!r} occurs twice")
        seen.add(key)


def _reasons(error: ValidationError) -> str:
    """The problems of the first few invalid fields."""
    details = error.errors(include_url=False, include_input=False)
    reasons = []
    for detail in details[:_SHOWN_REASONS]:
        # Keys are foreign text, too.
        field = quoted(".".join(str(part) for part in detail["loc"]), _SHOWN_CHARACTERS) or "manifest"
        unknown = detail["type"] == "extra_forbidden"
        reason = "is no field of a manifest" if unknown else detail["msg"].removeprefix("Value error, ")
        reasons.append(f"{field}: {reason}")
    more = len(details) - _SHOWN_REASONS
    return "; ".join(reasons) + (f"; and {more} more" if more > 0 else "")


def _torch_dtype(name: DTypeName) -> "torch.dtype":
    # Only here: what reads no weights, as the gateway and Control, does without torch.
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
