"""Opens a split checkpoint: its index, its backbone's headers and its bundles."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from echovlm_ray.checkpoint.layout import CheckpointIndex, backbone_directory, read_index, registry_root
from echovlm_ray.checkpoint.reader import StoredTensor, read_header
from echovlm_ray.checkpoint.released import ReleasedCheckpoint, examine
from echovlm_ray.checkpoint.schema import ModelShape
from experts.bundles.bundle import Bundle
from experts.bundles.manifest import Manifest
from experts.errors import InvalidBundleError, UnknownBundleError
from experts.registry.registry import Registry


@dataclass(frozen=True)
class OrganBundle:
    """One organ's bundle in a split checkpoint's registry."""

    bundle: Bundle

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The experts' and gates' tensors by their names in the bundle; a prototype is not part of a checkpoint.

        Raises:
            InvalidCheckpointError: a file is damaged.
        """
        tensors: dict[str, StoredTensor] = {}
        for path in self.bundle.locations.values():
            tensors |= read_header(path)
        return {name: tensor for name, tensor in tensors.items() if name.startswith("layers.")}

    def file_of(self, name: str) -> str:
        """The file, as the manifest names it, that holds a tensor."""
        path = self.tensors[name].path
        return next(file for file, location in self.bundle.locations.items() if location == path)


@dataclass(frozen=True, slots=True)
class SplitFolder:
    """A split checkpoint and its problems. Organs whose bundle cannot be opened are not in `organs`."""

    directory: Path
    index: CheckpointIndex
    backbone: ReleasedCheckpoint
    # In set order.
    organs: Mapping[str, OrganBundle]
    problems: list[str]


def open_split(directory: Path) -> SplitFolder:
    """Opens a split folder and checks headers, manifests and sizes against each other; collects problems.

    Raises:
        InvalidCheckpointError: there is no readable index.
    """
    index = read_index(directory)
    backbone = examine(backbone_directory(directory), routed=False)
    problems = [f"backbone: {problem}" for problem in backbone.problems]
    registry = Registry(registry_root(directory))
    organs: dict[str, OrganBundle] = {}
    for entry in index.organs:
        try:
            bundle = registry.open(entry.bundle_digest)
            bundle.verify(digests=False)
        except (InvalidBundleError, UnknownBundleError, OSError) as error:
            problems.append(f"bundle of {entry.organ}: {error}")
            continue
        organs[entry.organ] = OrganBundle(bundle)
        problems += [f"bundle of {entry.organ}: {problem}" for problem in _misfits(index, entry.organ, bundle.manifest)]
        if backbone.shape is not None:
            problems += [
                f"bundle of {entry.organ}: {problem}" for problem in _wrong_sizes(backbone.shape, bundle.manifest)
            ]
    if index.routing == "flat" and backbone.shape is not None and len(organs) == len(index.organs):
        problems += _partition_problems(organs, backbone.shape.num_experts)
    return SplitFolder(directory, index, backbone, organs, problems)


def _misfits(index: CheckpointIndex, organ: str, manifest: Manifest) -> list[str]:
    problems = []
    if manifest.organ != organ:
        problems.append(f"its manifest says it is of {manifest.organ}")
    if manifest.version != index.entry(organ).version:
        problems.append(f"its manifest says version {manifest.version}, the index {index.entry(organ).version}")
    if manifest.backbone_digest != index.backbone_digest:
        problems.append("it belongs to another backbone")
    return problems


def _wrong_sizes(shape: ModelShape, manifest: Manifest) -> list[str]:
    pairs = (
        ("num_layers", manifest.num_layers, "num_hidden_layers", shape.num_hidden_layers),
        ("hidden_size", manifest.hidden_size, "hidden_size", shape.hidden_size),
    )
    return [
        f"its {field} is {found}, but config.json has {key} {wanted}"
        for field, found, key, wanted in pairs
        if found != wanted
    ]


def _partition_problems(organs: Mapping[str, OrganBundle], num_experts: int) -> list[str]:
    owners: dict[int, str] = {}
    problems = []
    for organ, member in organs.items():
        if member.manifest.source_experts is None:
            return [f"bundle of {organ}: does not say which experts of the checkpoint it has (source_experts)"]
        for expert in member.manifest.source_experts:
            if expert in owners:
                problems.append(f"expert {expert} is in the bundles of {owners[expert]} and {organ}")
            owners[expert] = organ
    if gaps := sorted(set(range(num_experts)) - set(owners)):
        problems.append(f"no bundle has expert {', '.join(map(str, gaps))}")
    if beyond := sorted(set(owners) - set(range(num_experts))):
        problems.append(f"expert {', '.join(map(str, beyond))}: config.json has only {num_experts}")
    return problems
