"""Compares two bundles: manifest fields, experts, gate rows, layer by layer."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from experts.bundles.bundle import Bundle
from experts.bundles.layout import expert_tensors_of_layer
from experts.bundles.manifest import PROJECTIONS, Manifest


@dataclass(frozen=True, slots=True)
class FieldChange:
    """A field of the manifest that differs. Values are as in JSON, and None for the default."""

    field: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class LayerChange:
    """The change of one layer: the Frobenius norm of the difference, relative to the norm before.

    Attributes:
        layer: from 0.
        experts: the change of all common experts together.
        most_changed: the largest change of an expert and its index in the first bundle; None without common experts.
        gate: the change of the common experts' gate rows.
    """

    layer: int
    experts: float
    most_changed: tuple[int, float] | None
    gate: float


@dataclass(frozen=True, slots=True)
class BundleDiff:
    """The differences from one bundle to another.

    Attributes:
        before: the first bundle's digest.
        after: the second bundle's digest.
        fields: the differences of the manifests, without the list of files.
        pairs: (expert of the first, expert of the second): bitwise equal ones first, the rest by index.
        unchanged: the number of bitwise equal pairs.
        removed: experts that only the first bundle has.
        added: experts that only the second bundle has.
        layers: the change of each layer; empty if the sizes differ, see `incomparable`.
        incomparable: why the weights cannot be compared; None if they were compared.
    """

    before: str
    after: str
    fields: tuple[FieldChange, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    unchanged: int = 0
    removed: tuple[int, ...] = ()
    added: tuple[int, ...] = ()
    layers: tuple[LayerChange, ...] = ()
    incomparable: str | None = None

    @property
    def same_weights(self) -> bool:
        """Whether the experts are bitwise equal and the gate rows equal in value."""
        everything_paired = not self.removed and not self.added and self.unchanged == len(self.pairs)
        return self.incomparable is None and everything_paired and all(layer.gate == 0 for layer in self.layers)


def diff_bundles(before: Bundle, after: Bundle) -> BundleDiff:
    """Compares two bundles. Only two experts' matrices are in memory at a time.

    Raises:
        InvalidBundleError: a tensor is missing or a file is damaged.
    """
    fields = _field_changes(before.manifest, after.manifest)
    if reason := _incomparable(before.manifest, after.manifest):
        return BundleDiff(before.digest, after.digest, fields, incomparable=reason)
    pairs, unchanged = _pairs(_expert_digests(before), _expert_digests(after))
    removed = set(range(before.manifest.num_experts)) - {left for left, _ in pairs}
    added = set(range(after.manifest.num_experts)) - {right for _, right in pairs}
    return BundleDiff(
        before.digest,
        after.digest,
        fields,
        pairs=tuple(pairs),
        unchanged=unchanged,
        removed=tuple(sorted(removed)),
        added=tuple(sorted(added)),
        layers=tuple(_layer_change(before, after, layer, pairs) for layer in range(before.manifest.num_layers)),
    )


def _field_changes(before: Manifest, after: Manifest) -> tuple[FieldChange, ...]:
    left, right = (
        manifest.model_dump(mode="json", exclude_defaults=True, exclude={"files"}) for manifest in (before, after)
    )
    names = [name for name in type(before).model_fields if left.get(name) != right.get(name)]
    return tuple(FieldChange(name, left.get(name), right.get(name)) for name in names)


def _incomparable(before: Manifest, after: Manifest) -> str | None:
    for name in ("num_layers", "hidden_size", "intermediate_size"):
        left, right = getattr(before, name), getattr(after, name)
        if left != right:
            return f"{name} is {left} in the first and {right} in the second"
    return None


def _expert_digests(bundle: Bundle) -> list[bytes]:
    """A digest of every expert: its matrices in all layers, and their dtype."""
    manifest = bundle.manifest
    digests = [hashlib.sha256(manifest.dtype.encode()) for _ in range(manifest.num_experts)]
    for layer in range(manifest.num_layers):
        names = expert_tensors_of_layer(manifest, layer)
        for projection in PROJECTIONS:
            for digest, name in zip(digests, names[projection], strict=True):
                octets = bundle.tensor(name).contiguous().reshape(-1).view(torch.uint8)
                digest.update(octets.numpy().data)
    return [digest.digest() for digest in digests]


def _pairs(before: list[bytes], after: list[bytes]) -> tuple[list[tuple[int, int]], int]:
    """Pairs of equal experts, preferably with the same index, then the rest by index."""
    free = set(range(len(after)))
    pairs: list[tuple[int, int]] = []
    for same_place in (True, False):
        taken = {left for left, _ in pairs}
        for left, digest in enumerate(before):
            if left in taken:
                continue
            candidates = [left] if same_place else sorted(free)
            right = next((right for right in candidates if right in free and after[right] == digest), None)
            if right is not None:
                pairs.append((left, right))
                free.remove(right)
    unchanged = len(pairs)
    taken = {left for left, _ in pairs}
    pairs += [(left, left) for left in range(len(before)) if left not in taken and left in free]
    return sorted(pairs), unchanged


def _layer_change(before: Bundle, after: Bundle, layer: int, pairs: list[tuple[int, int]]) -> LayerChange:
    left_names, right_names = (expert_tensors_of_layer(bundle.manifest, layer) for bundle in (before, after))
    total, total_difference = 0.0, 0.0
    most_changed: tuple[int, float] | None = None
    for left, right in pairs:
        norm, difference = 0.0, 0.0
        for projection in PROJECTIONS:
            old = before.tensor(left_names[projection][left]).float()
            new = after.tensor(right_names[projection][right]).float()
            norm += float(old.square().sum(dtype=torch.float64))
            difference += float((new - old).square().sum(dtype=torch.float64))
        total += norm
        total_difference += difference
        change = _share(difference, norm)
        if most_changed is None or change > most_changed[1]:
            most_changed = (left, change)
    old_gate, new_gate = (
        bundle.gate_ED(layer)[[pair[side] for pair in pairs]].double() for side, bundle in enumerate((before, after))
    )
    gate = _share(float((new_gate - old_gate).square().sum()), float(old_gate.square().sum()))
    return LayerChange(layer, _share(total_difference, total), most_changed, gate)


def _share(difference: float, norm: float) -> float:
    """The ratio of two norms, given their squares; the first norm if the second is 0."""
    return float((difference / norm) ** 0.5) if norm else float(difference**0.5)
