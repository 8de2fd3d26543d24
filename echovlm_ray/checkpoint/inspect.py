"""Inspects a checkpoint folder: its kind, its parameters by part, and its problems. Reads headers only."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from echovlm_ray.checkpoint.layout import (
    CheckpointIndex,
    InvalidCheckpointError,
    backbone_directory,
    is_split_folder,
    read_index,
)
from echovlm_ray.checkpoint.reader import StoredTensor
from echovlm_ray.checkpoint.released import ReleasedCheckpoint, examine
from echovlm_ray.checkpoint.schema import PARTS, part_of
from echovlm_ray.checkpoint.split_folder import OrganBundle, SplitFolder, open_split

Kind = Literal["released", "split", "backbone", "qwen2_vl", "unknown"]

KIND_NAMES: dict[Kind, str] = {
    "released": "an EchoVLM in the released layout",
    "split": "a split EchoVLM: a backbone and a bundle of experts per organ",
    "backbone": "the backbone of a split EchoVLM, without its routed experts",
    "qwen2_vl": "a stock Qwen2-VL, without any expert",
    "unknown": "no checkpoint that EchoVLM-Ray knows",
}


class PartReport(BaseModel):
    """One part of the model."""

    model_config = ConfigDict(frozen=True)

    part: str
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]


class OrganReport(BaseModel):
    """One organ's bundle in a split checkpoint."""

    model_config = ConfigDict(frozen=True)

    organ: str
    version: str
    bundle_digest: str
    num_experts: int
    # The experts' indices in the checkpoint that was split; None when the bundle does not say.
    source_experts: tuple[int, ...] | None
    parameters: int
    bytes: int


class CheckpointReport(BaseModel):
    """The report of `echoray checkpoint inspect`."""

    model_config = ConfigDict(frozen=True)

    directory: str
    kind: Kind
    # Of one model: in a split checkpoint with copies the experts of one organ are counted.
    parameters: int
    parts: tuple[PartReport, ...]
    dtypes: tuple[str, ...]
    # Of all weight files, each counted once.
    bytes_on_disk: int
    weight_files: int
    num_layers: int | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    # Of split checkpoints only.
    name: str | None = None
    version: str | None = None
    description: str | None = None
    routing: str | None = None
    backbone_digest: str | None = None
    expert_set_id: str | None = None
    organs: tuple[OrganReport, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def inspect(directory: Path) -> CheckpointReport:
    """Inspects a folder. The report's `problems` has the problems.

    Raises:
        InvalidCheckpointError: there is no such folder.
    """
    if not directory.is_dir():
        raise InvalidCheckpointError(f"{directory} is not a folder; give the folder that holds config.json")
    if is_split_folder(directory):
        return _inspect_split(directory)
    if backbone_directory(directory).is_dir() and not (directory / "config.json").exists():
        report = _report(directory, "unknown", [], [])
        return report.model_copy(update={"problems": ("echovlm.json is missing: the split was not finished",)})
    routed = None
    checkpoint = examine(directory)
    if checkpoint.stores_moe and not checkpoint.stores_experts:
        # A complete backbone, not a released checkpoint with missing tensors.
        routed = False
        checkpoint = examine(directory, routed=False)
    return _inspect_released(checkpoint, is_backbone=routed is False)


def _inspect_released(checkpoint: ReleasedCheckpoint, *, is_backbone: bool) -> CheckpointReport:
    kind: Kind = "unknown"
    if checkpoint.folder.tensors and checkpoint.config:
        kind = "released"
        if is_backbone:
            kind = "backbone"
        elif not checkpoint.stores_moe and not (checkpoint.shape and checkpoint.shape.has_experts):
            kind = "qwen2_vl"
    report = _report(checkpoint.directory, kind, _released_parts(checkpoint), checkpoint.folder.files)
    return report.model_copy(
        update={
            **_sizes(checkpoint),
            "notes": tuple(checkpoint.notes),
            "problems": tuple(checkpoint.problems),
        }
    )


def _inspect_split(directory: Path) -> CheckpointReport:
    try:
        index = read_index(directory)
        folder = open_split(directory)
    except InvalidCheckpointError as error:
        report = _report(directory, "split", [], [])
        return report.model_copy(update={"problems": (str(error),)})
    members = list(folder.organs.values())
    # Copies count once: a model uses one organ's.
    counted = members if index.routing == "flat" else members[:1]
    files = {path for member in members for path in member.bundle.locations.values()}
    tensors = [*_released_parts(folder.backbone), *_by_part(counted)]
    report = _report(directory, "split", tensors, [*folder.backbone.folder.files, *sorted(files)])
    return report.model_copy(
        update={
            **_sizes(folder.backbone),
            **_identity(index),
            "organs": tuple(_organ_report(organ, member) for organ, member in folder.organs.items()),
            "notes": (*folder.backbone.notes, *_organ_notes(folder)),
            "problems": tuple(folder.problems),
        }
    )


def _identity(index: CheckpointIndex) -> dict[str, str]:
    return {
        "name": index.name,
        "version": index.version,
        "description": index.description,
        "routing": index.routing,
        "backbone_digest": index.backbone_digest,
        "expert_set_id": index.expert_set().id,
    }


def _by_part(members: Iterable[OrganBundle]) -> list[tuple[str, StoredTensor]]:
    return [
        ("gates" if name.endswith(".gate.weight") else "routed experts", tensor)
        for member in members
        for name, tensor in member.tensors.items()
    ]


def _organ_report(organ: str, member: OrganBundle) -> OrganReport:
    manifest = member.manifest
    return OrganReport(
        organ=organ,
        version=manifest.version,
        bundle_digest=manifest.digest,
        num_experts=manifest.num_experts,
        source_experts=manifest.source_experts,
        parameters=sum(tensor.num_elements for tensor in member.tensors.values()),
        bytes=manifest.size_bytes,
    )


def _organ_notes(folder: SplitFolder) -> list[str]:
    if folder.index.routing == "flat":
        return ["the experts are divided among the organs; one gate spans them all"]
    by_files: dict[frozenset[str], list[str]] = {}
    for organ, member in folder.organs.items():
        key = frozenset(entry.sha256 for entry in member.manifest.files)
        by_files.setdefault(key, []).append(organ)
    if len(by_files) == 1:
        return ["all organs have the same experts, stored once"]
    return [f"the same experts, stored once: {', '.join(group)}" for group in by_files.values() if len(group) > 1]


def _sizes(checkpoint: ReleasedCheckpoint) -> dict[str, int | None]:
    shape = checkpoint.shape
    if shape is None:
        return {}
    has_experts = shape.has_experts
    return {
        "num_layers": shape.num_hidden_layers,
        "num_experts": shape.num_experts if has_experts else None,
        "num_experts_per_tok": shape.num_experts_per_tok if has_experts else None,
    }


def _report(
    directory: Path, kind: Kind, tensors: Iterable[tuple[str, StoredTensor]], files: Iterable[Path]
) -> CheckpointReport:
    grouped: dict[str, list[StoredTensor]] = {part: [] for part in PARTS}
    for part, tensor in tensors:
        grouped.setdefault(part, []).append(tensor)
    parts = tuple(
        PartReport(
            part=part,
            parameters=sum(tensor.num_elements for tensor in members),
            bytes=sum(tensor.nbytes for tensor in members),
            dtypes=tuple(sorted({tensor.dtype for tensor in members})),
        )
        for part, members in grouped.items()
        if members
    )
    paths = list(files)
    return CheckpointReport(
        directory=str(directory),
        kind=kind,
        parameters=sum(part.parameters for part in parts),
        parts=parts,
        dtypes=tuple(sorted({dtype for part in parts for dtype in part.dtypes})),
        bytes_on_disk=sum(path.stat().st_size for path in paths),
        weight_files=len(paths),
    )


def _released_parts(checkpoint: ReleasedCheckpoint) -> list[tuple[str, StoredTensor]]:
    return [(part_of(name) or "unknown", tensor) for name, tensor in checkpoint.folder.tensors.items()]
