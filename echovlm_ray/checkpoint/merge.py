"""Joins a split checkpoint into one in the released layout: the exact inverse of splitting."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from echovlm_ray.checkpoint.atomic import new_folder, require_space, require_vacant
from echovlm_ray.checkpoint.layout import InvalidCheckpointError, backbone_directory, registry_root
from echovlm_ray.checkpoint.reader import CONFIG_NAME, StoredTensor
from echovlm_ray.checkpoint.released import copy_companions, first_problems
from echovlm_ray.checkpoint.schema import backbone_digest, expert_name, gate_name
from echovlm_ray.checkpoint.split_folder import OrganBundle, SplitFolder, open_split
from echovlm_ray.checkpoint.writer import (
    DEFAULT_MAX_SHARD_BYTES,
    Specification,
    load,
    specification,
    write_released,
)
from experts.bundles.bundle import verify_file
from experts.bundles.layout import expert_tensor, gate_tensor
from experts.bundles.manifest import PROJECTIONS
from experts.errors import InvalidBundleError, UnknownBundleError
from experts.registry.registry import Registry


def merge(
    source: Path,
    destination: Path,
    *,
    organ: str | None = None,
    version: str | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    start: Callable[[int], None] = lambda _: None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes a split checkpoint as one model in the released layout. Only one tensor at a time is in memory.

    Args:
        source: a split folder.
        destination: the folder to make; it appears when it is complete.
        organ: write the model with this organ's experts; needed once the organs' copies differ.
        version: which version of that organ's bundle; by default the one in the index.
        max_shard_bytes: the most bytes of weights in one file.
        start: called with the number of bytes to write, before the first.
        progress: called with the bytes of every tensor written.

    Raises:
        InvalidCheckpointError: the source is invalid, its organs' copies differ, or the destination exists.
    """
    require_vacant(destination)
    folder = open_split(source)
    if folder.problems:
        raise InvalidCheckpointError(f"{source}: {first_problems(folder.problems)}")
    chosen = _choose(folder, organ, version)
    _verify_files(chosen)
    plan = _plan(folder, chosen)
    size = sum(tensor.nbytes for sources in plan.values() for tensor, _ in sources.pieces)
    require_space(destination, size)
    start(size)
    with new_folder(destination) as partial:
        digests = write_released(
            partial,
            {name: source.specification for name, source in plan.items()},
            lambda name: plan[name].load(),
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
        _check_backbone(folder, digests)
        # Last: without config.json the weights are no checkpoint.
        copy_companions(backbone_directory(source), partial)
        _adapt_config(partial / CONFIG_NAME, folder, chosen)


@dataclass(frozen=True, slots=True)
class _Source:
    """The source of one merged tensor: a stored tensor, or rows of several (in a gate)."""

    specification: Specification
    # Each with the rows that it fills; None when it is the whole tensor.
    pieces: tuple[tuple[StoredTensor, tuple[int, ...] | None], ...]

    def load(self) -> torch.Tensor:
        """Makes the tensor."""
        first, rows = self.pieces[0]
        if rows is None:
            return load(first)
        dtype, shape = self.specification
        merged = torch.empty(shape, dtype=dtype)
        for stored, rows in self.pieces:
            merged[list(rows or ())] = load(stored)
        return merged


def _choose(folder: SplitFolder, organ: str | None, version: str | None) -> Mapping[str, OrganBundle]:
    """The bundles to merge: all of a partition, one of equal copies, or the requested one."""
    if organ is None:
        if version is not None:
            raise InvalidCheckpointError("a version belongs to an organ: add --organ")
        if folder.index.routing == "flat":
            return folder.organs
        _require_agreement(folder.organs)
        first = next(iter(folder.organs))
        return {first: folder.organs[first]}
    folder.index.entry(organ)
    if folder.index.routing == "flat":
        raise InvalidCheckpointError(
            f"the experts are divided among the organs, so {organ} alone is no model; merge without --organ"
        )
    if version is None:
        return {organ: folder.organs[organ]}
    registry = Registry(registry_root(folder.directory))
    try:
        bundle = registry.open(registry.find(organ, version).digest)
        bundle.verify(digests=False)
    except (InvalidBundleError, UnknownBundleError) as error:
        raise InvalidCheckpointError(str(error)) from None
    if bundle.manifest.backbone_digest != folder.index.backbone_digest:
        raise InvalidCheckpointError(f"version {version} of {organ} belongs to another backbone")
    return {organ: OrganBundle(bundle)}


def _require_agreement(organs: Mapping[str, OrganBundle]) -> None:
    """Refuses copies that differ.

    Raises:
        InvalidCheckpointError: names every organ that differs from the first, and the first tensor that does.
    """
    reference, *others = organs
    differing = [
        (organ, reason)
        for organ in others
        if (reason := _first_difference(organs[reference], organs[organ])) is not None
    ]
    if differing:
        names = ", ".join(organ for organ, _ in differing)
        organ, reason = differing[0]
        raise InvalidCheckpointError(
            f"the organs' experts no longer agree: {names} differ from {reference}, first {organ} in {reason}. "
            f"Export one organ's model with --organ {reference} or --organ {organ}"
        )


def _first_difference(left: OrganBundle, right: OrganBundle) -> str | None:
    """Where two bundles' weights differ first; None if nowhere, however they are spread over files."""
    if _weight_files(left) == _weight_files(right):
        return None
    for name in sorted(left.tensors.keys() | right.tensors.keys()):
        if name not in left.tensors or name not in right.tensors:
            return f"{name} (only one of them has it)"
        ours, theirs = left.tensors[name], right.tensors[name]
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            return f"{name} ({ours.dtype} {list(ours.shape)} and {theirs.dtype} {list(theirs.shape)})"
        if ours.sha256() != theirs.sha256():
            return f"{name} ({right.file_of(name)})"
    return None


def _weight_files(organ: OrganBundle) -> set[str]:
    holding = {organ.file_of(name) for name in organ.tensors}
    return {entry.sha256 for entry in organ.manifest.files if entry.path in holding}


def _verify_files(chosen: Mapping[str, OrganBundle]) -> None:
    for organ, member in chosen.items():
        for entry in member.manifest.files:
            try:
                verify_file(member.bundle.locations[entry.path], entry)
            except InvalidBundleError as error:
                raise InvalidCheckpointError(f"bundle of {organ}: {error}") from None


def _plan(folder: SplitFolder, chosen: Mapping[str, OrganBundle]) -> dict[str, _Source]:
    """Every tensor of the merged checkpoint, in the order in which it is written, and what it is made of."""
    stored = sorted(folder.backbone.folder.tensors.values(), key=lambda tensor: (tensor.path, tensor.offset))
    plan = {tensor.name: _Source(specification(tensor), ((tensor, None),)) for tensor in stored}
    places = {organ: _places(member, alone=len(chosen) == 1) for organ, member in chosen.items()}
    for layer in range(folder.backbone.known_shape().num_hidden_layers):
        gates = [(member.tensors[gate_tensor(layer)], places[organ]) for organ, member in chosen.items()]
        dtypes = {gate.dtype for gate, _ in gates}
        if len(dtypes) > 1:
            raise InvalidCheckpointError(f"the organs' gates have several dtypes ({', '.join(sorted(dtypes))})")
        dtype, (_, hidden) = specification(gates[0][0])
        plan[gate_name(layer)] = _Source((dtype, (sum(len(rows) for _, rows in gates), hidden)), tuple(gates))
        for organ, member in chosen.items():
            for local, expert in enumerate(places[organ]):
                for projection in PROJECTIONS:
                    tensor = member.tensors[expert_tensor(layer, local, projection)]
                    name = expert_name(layer, expert, f"{projection}_proj")
                    plan[name] = _Source(specification(tensor), ((tensor, None),))
    return plan


def _places(member: OrganBundle, alone: bool) -> tuple[int, ...]:
    """The indices of a bundle's experts in the merged model."""
    experts, count = member.manifest.source_experts, member.manifest.num_experts
    # An organ may have lost or gained experts since the split; then the original indices are not valid.
    if experts is None or (alone and set(experts) != set(range(count))):
        return tuple(range(count))
    return experts


def _check_backbone(folder: SplitFolder, digests: Mapping[str, str]) -> None:
    described = {
        name: (tensor.dtype, tensor.shape, digests[name]) for name, tensor in folder.backbone.folder.tensors.items()
    }
    if (found := backbone_digest(folder.backbone.config, described)) != folder.index.backbone_digest:
        raise InvalidCheckpointError(
            f"{backbone_directory(folder.directory)} has changed since the split: its digest is {found[:12]}…, the "
            f"index says {folder.index.backbone_digest[:12]}…. Its experts were made for the old one; split again"
        )


def _adapt_config(path: Path, folder: SplitFolder, chosen: Mapping[str, OrganBundle]) -> None:
    """Changes the sizes in config.json where an organ's experts are not those of the split; else leaves its bytes."""
    shape = folder.backbone.known_shape()
    num_experts = sum(member.manifest.num_experts for member in chosen.values())
    inner = {member.manifest.intermediate_size for member in chosen.values()}
    if len(inner) > 1:
        raise InvalidCheckpointError("the organs' experts have several inner sizes; one model has one")
    sizes = {"num_experts": num_experts, "moe_intermediate_size": inner.pop()}
    if sizes == {"num_experts": shape.num_experts, "moe_intermediate_size": shape.moe_intermediate_size}:
        return
    if shape.num_experts_per_tok is not None and num_experts < shape.num_experts_per_tok:
        raise InvalidCheckpointError(
            f"config.json routes each token to {shape.num_experts_per_tok} experts, but there are {num_experts}"
        )
    config = json.loads(path.read_bytes())
    target = config if "num_experts" in config or "text_config" not in config else config["text_config"]
    target.update(sizes)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
