"""Splits a checkpoint in the released layout into a backbone and one bundle of experts per organ."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from echovlm_ray.checkpoint.atomic import new_folder, require_space, require_vacant
from echovlm_ray.checkpoint.groups import Groups
from echovlm_ray.checkpoint.layout import (
    CheckpointIndex,
    InvalidCheckpointError,
    OrganEntry,
    backbone_directory,
    registry_root,
    write_index,
)
from echovlm_ray.checkpoint.organs import ORGAN_SYNONYMS
from echovlm_ray.checkpoint.reader import StoredTensor
from echovlm_ray.checkpoint.released import ReleasedCheckpoint, copy_companions, open_released
from echovlm_ray.checkpoint.schema import backbone_digest, expert_name, gate_name, is_routed
from echovlm_ray.checkpoint.writer import DEFAULT_MAX_SHARD_BYTES, load, specification, write_released
from experts.bundles.bundle import Bundle
from experts.bundles.layout import expert_tensors_of_layer, gate_tensor
from experts.bundles.manifest import PROJECTIONS, BundleDescription, DTypeName, Manifest
from experts.bundles.writer import derive_bundle, write_bundle
from experts.registry.registry import Registry
from router.gating.expert_set import Routing

_DTYPE_NAMES: dict[torch.dtype, DTypeName] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_WORK_NAME = ".bundles"


@dataclass(frozen=True, slots=True)
class Labels:
    """The metadata of a split checkpoint and its bundles."""

    name: str
    version: str = "1.0.0"
    description: str = ""
    authors: str = "the authors of the source checkpoint"
    # NOASSERTION is SPDX for "look at the source".
    license: str = "NOASSERTION"
    intended_use: str = "Research on ultrasound reports. Not a medical device; not for diagnosis."

    def __post_init__(self) -> None:
        """Checks what the bundles' manifests cannot: they append the organ to the name."""
        if not self.name:
            raise InvalidCheckpointError("name: must not be empty; give one with --name")


@dataclass(frozen=True, slots=True)
class SplitResult:
    """The result of a split."""

    index: CheckpointIndex
    # Files of the source that were left behind because nothing in the system reads them.
    left_behind: list[str]


def split(
    source: Path,
    destination: Path,
    *,
    groups: Callable[[int], Groups],
    routing: Routing,
    labels: Labels,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    start: Callable[[int], None] = lambda _: None,
    progress: Callable[[int], None] = lambda _: None,
) -> SplitResult:
    """Splits a checkpoint. Only one tensor at a time is in memory.

    Args:
        source: a folder in the released layout.
        destination: the folder to make; it appears when it is complete.
        groups: given the number of experts, says which organ gets which.
        routing: "organs" when every group has all the experts, "flat" when they are divided.
        labels: what the result says about itself.
        max_shard_bytes: the most bytes of weights in one file.
        start: called with the number of bytes to write, before the first.
        progress: called with the bytes of every tensor written.

    Raises:
        InvalidCheckpointError: the source is not a valid EchoVLM, the groups do not fit it, or the destination exists.
    """
    require_vacant(destination)
    checkpoint = open_released(source)
    members = groups(checkpoint.known_shape().num_experts)
    for organ, experts in members.items():
        # Before anything is written: a description that is not valid must not cost an hour.
        _describe(checkpoint, organ, experts, labels, "0" * 64)
    require_space(destination, checkpoint.folder.nbytes)
    start(checkpoint.folder.nbytes)
    with new_folder(destination) as partial:
        left_behind, digest = _write_backbone(checkpoint, backbone_directory(partial), max_shard_bytes, progress)
        manifests = _write_bundles(partial, checkpoint, members, labels, digest, max_shard_bytes, progress)
        index = CheckpointIndex(
            name=labels.name,
            version=labels.version,
            description=labels.description,
            backbone_digest=digest,
            routing=routing,
            organs=tuple(
                OrganEntry(organ=manifest.organ, version=manifest.version, bundle_digest=manifest.digest)
                for manifest in manifests
            ),
        )
        write_index(partial, index)
    return SplitResult(index, left_behind)


def _write_backbone(
    checkpoint: ReleasedCheckpoint, directory: Path, max_shard_bytes: int, progress: Callable[[int], None]
) -> tuple[list[str], str]:
    directory.mkdir()
    # In the order in which they lie in the source, so that it is read from front to back.
    stored = sorted(
        (tensor for name, tensor in checkpoint.folder.tensors.items() if not is_routed(name)),
        key=lambda tensor: (tensor.path, tensor.offset),
    )
    by_name = {tensor.name: tensor for tensor in stored}
    digests = write_released(
        directory,
        {name: specification(tensor) for name, tensor in by_name.items()},
        lambda name: load(by_name[name]),
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
    described = {name: (tensor.dtype, tensor.shape, digests[name]) for name, tensor in by_name.items()}
    return copy_companions(checkpoint.directory, directory), backbone_digest(checkpoint.config, described)


def _write_bundles(
    partial: Path,
    checkpoint: ReleasedCheckpoint,
    groups: Groups,
    labels: Labels,
    digest: str,
    max_shard_bytes: int,
    progress: Callable[[int], None],
) -> list[Manifest]:
    """Writes a bundle per group; a group with the experts of an earlier one shares its files."""
    registry_root(partial).mkdir()
    registry = Registry(registry_root(partial))
    manifests: list[Manifest] = []
    written: dict[tuple[int, ...], Bundle] = {}
    with _work_folder(partial) as work:
        for organ, experts in groups.items():
            description = _describe(checkpoint, organ, experts, labels, digest)
            directory = work / organ
            if experts in written:
                differing = {
                    field: getattr(description, field)
                    for field in BundleDescription.model_fields
                    if getattr(description, field) != getattr(written[experts].manifest, field)
                }
                derive_bundle(directory, written[experts], differing)
            else:
                source = _BundleSource(checkpoint.folder.tensors, description, experts, progress)
                write_bundle(directory, description, source, max_file_bytes=max_shard_bytes)
                written[experts] = Bundle.open(directory)
            # Linked, not copied: the work folder is not written to again.
            manifests.append(registry.push(directory, link=True))
    return manifests


@contextmanager
def _work_folder(partial: Path) -> Iterator[Path]:
    work = partial / _WORK_NAME
    work.mkdir()
    yield work
    shutil.rmtree(work)


class _BundleSource:
    """Reads a bundle's tensors from the released checkpoint."""

    def __init__(
        self,
        tensors: dict[str, StoredTensor],
        description: BundleDescription,
        experts: tuple[int, ...],
        progress: Callable[[int], None],
    ) -> None:
        """Works out which tensor comes from where."""
        self._tensors = tensors
        self._experts = list(experts)
        self._progress = progress
        self._sources: dict[str, str] = {}
        self._gates: dict[str, str] = {}
        for layer in range(description.num_layers):
            self._gates[gate_tensor(layer)] = gate_name(layer)
            names = expert_tensors_of_layer(description, layer)
            for projection in PROJECTIONS:
                for name, expert in zip(names[projection], experts, strict=True):
                    self._sources[name] = expert_name(layer, expert, f"{projection}_proj")

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor of that name in the bundle."""
        if name in self._gates:
            tensor = load(self._tensors[self._gates[name]])[self._experts]
        else:
            tensor = load(self._tensors[self._sources[name]])
        self._progress(tensor.nbytes)
        return tensor


def _describe(
    checkpoint: ReleasedCheckpoint, organ: str, experts: tuple[int, ...], labels: Labels, digest: str
) -> BundleDescription:
    shape = checkpoint.known_shape()
    assert shape.moe_intermediate_size is not None
    gate_dtype = _one_dtype(checkpoint, gate_name(0), "gates")
    dtype = _one_dtype(checkpoint, expert_name(0, 0, "gate_proj"), "routed experts")
    try:
        return BundleDescription(
            name=f"{labels.name}-{organ}",
            organ=organ,
            version=labels.version,
            description=labels.description or _origin(labels.name, organ, experts, shape.num_experts),
            authors=labels.authors,
            license=labels.license,
            intended_use=labels.intended_use,
            changelog={labels.version: "Split from the whole checkpoint."},
            references=("https://arxiv.org/abs/2509.14977",),
            organ_synonyms=ORGAN_SYNONYMS.get(organ, ()),
            backbone_digest=digest,
            num_layers=shape.num_hidden_layers,
            num_experts=len(experts),
            hidden_size=shape.hidden_size,
            intermediate_size=shape.moe_intermediate_size,
            dtype=dtype,
            gate_dtype=None if gate_dtype == dtype else gate_dtype,
            source_experts=experts,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidCheckpointError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _origin(name: str, organ: str, experts: tuple[int, ...], num_experts: int) -> str:
    """What the bundle is; released experts carry no organ label, so none is claimed for them."""
    if len(experts) == num_experts:
        return f"A copy of all the routed experts of {name}, for {organ} to be trained apart; not specialised yet."
    listed = ", ".join(map(str, experts))
    return f"Routed experts {listed} of {name}, assigned to {organ} by the split; not trained for it."


def _one_dtype(checkpoint: ReleasedCheckpoint, example: str, part: str) -> DTypeName:
    """The dtype that all gates, or all experts, have in common."""
    is_gate = part == "gates"
    dtypes = {
        tensor.dtype
        for name, tensor in checkpoint.folder.tensors.items()
        if is_routed(name) and (".experts." not in name) == is_gate
    }
    if len(dtypes) > 1:
        raise InvalidCheckpointError(
            f"{checkpoint.directory}: the {part} have several dtypes ({', '.join(sorted(dtypes))}); convert them to one"
        )
    return _DTYPE_NAMES[specification(checkpoint.folder.tensors[example])[0]]
