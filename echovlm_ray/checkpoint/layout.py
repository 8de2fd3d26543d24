"""The layout of a split checkpoint's folder, and its index.

```
DIR/echovlm.json   the index; written last, so a folder without it is no checkpoint
DIR/backbone/      the released layout without moe.gate and moe.experts, with tokenizer and processor files
DIR/registry/      one expert bundle per organ, stored by content (experts.registry)
```
"""

import json
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from router.gating.expert_set import ExpertSet, ExpertSetMember, Routing

INDEX_NAME = "echovlm.json"
BACKBONE_NAME = "backbone"
REGISTRY_NAME = "registry"
FORMAT: Final = "echovlm-split/1"
# Of the checkpoint that `echoray checkpoint demo` makes.
DEMO_NAME: Final = "echovlm-demo"
# The order in which DESIGN names the regions that EchoVLM was trained on; it is the set order.
ORGANS = ("breast", "gynaecology", "heart", "kidney", "liver", "thyroid", "vessel")

# The same rules as in bundles' manifests: an organ's name is used for a folder, a Serve application and a health
# service.
OrganName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class InvalidCheckpointError(ValueError):
    """A checkpoint folder is invalid. The text names the file or tensor, and the fix."""


class OrganEntry(BaseModel):
    """One organ of a split checkpoint and its original bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    organ: OrganName
    version: str
    bundle_digest: Digest


class CheckpointIndex(BaseModel):
    """`echovlm.json`: the index of a split folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["echovlm-split/1"] = FORMAT
    name: Annotated[str, Field(min_length=1)]
    version: str
    description: str
    backbone_digest: Digest
    # "organs": every organ has a copy of all experts. "flat": the experts are divided and one softmax spans them all.
    routing: Routing
    # In set order: partial sums are added, and in a partition the gate's rows are stacked, in this order.
    organs: tuple[OrganEntry, ...]

    @model_validator(mode="after")
    def _forms_an_expert_set(self) -> Self:
        self.expert_set()
        return self

    def expert_set(self) -> ExpertSet:
        """The original expert set of this checkpoint."""
        return ExpertSet(
            backbone_digest=self.backbone_digest,
            routing=self.routing,
            members=tuple(
                ExpertSetMember(organ=entry.organ, bundle_digest=entry.bundle_digest) for entry in self.organs
            ),
        )

    def entry(self, organ: str) -> OrganEntry:
        """The entry of an organ.

        Raises:
            InvalidCheckpointError: the checkpoint has no such organ.
        """
        for entry in self.organs:
            if entry.organ == organ:
                return entry
        raise InvalidCheckpointError(
            f"the checkpoint has no organ {organ!r}; it has {', '.join(entry.organ for entry in self.organs)}"
        )


def backbone_directory(directory: Path) -> Path:
    """The folder of a split checkpoint's backbone: everything but the routed experts and their gates."""
    return Path(directory) / BACKBONE_NAME


def registry_root(directory: Path) -> Path:
    """The folder of a split checkpoint's bundles: the root of an `experts.registry.Registry`."""
    return Path(directory) / REGISTRY_NAME


def is_split_folder(directory: Path) -> bool:
    """Whether a folder has a split checkpoint's index; says nothing about its validity."""
    return (Path(directory) / INDEX_NAME).is_file()


def read_index(directory: Path) -> CheckpointIndex:
    """Reads a split folder's index.

    Raises:
        InvalidCheckpointError: the folder or the index is missing or invalid.
    """
    directory = Path(directory)
    path = directory / INDEX_NAME
    if not directory.is_dir():
        raise InvalidCheckpointError(
            f"{directory} is not a folder; `echoray checkpoint demo {directory}` makes one, or split your own"
        )
    if not path.is_file():
        hint = "it holds a config.json, so split it first: `echoray checkpoint split SRC DST`"
        if not (directory / "config.json").is_file():
            hint = "give the folder that `echoray checkpoint split` or `echoray checkpoint demo` made"
        raise InvalidCheckpointError(f"{directory} is no split checkpoint: it has no {INDEX_NAME}; {hint}")
    try:
        return CheckpointIndex.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InvalidCheckpointError(f"{path}: {field}: {first['msg']}") from None


def write_index(directory: Path, index: CheckpointIndex) -> None:
    """Writes a split folder's index; call it when everything else is in place."""
    text = json.dumps(index.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (Path(directory) / INDEX_NAME).write_text(text + "\n", encoding="utf-8")
