"""Packs one organ's routed experts as a bundle for the backbone of a split checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from echovlm_ray.checkpoint.atomic import require_space
from echovlm_ray.checkpoint.bundle_card import BundleCard, describe
from echovlm_ray.checkpoint.layout import InvalidCheckpointError
from echovlm_ray.checkpoint.organs import ORGAN_SYNONYMS
from echovlm_ray.checkpoint.pack_source import PackSource, bytes_to_compare, open_source, read_prototype
from echovlm_ray.checkpoint.reader import StoredTensor
from echovlm_ray.checkpoint.released import first_problems
from echovlm_ray.checkpoint.schema import expert_name, gate_name
from echovlm_ray.checkpoint.split_folder import open_split
from echovlm_ray.checkpoint.writer import DEFAULT_MAX_SHARD_BYTES, load, specification
from experts.bundles.finite import is_finite
from experts.bundles.layout import PROTOTYPE_TENSOR, expert_tensors_of_layer, gate_tensor
from experts.bundles.manifest import PROJECTIONS, BundleDescription, DTypeName, Manifest
from experts.bundles.probe import probe_sizes
from experts.bundles.writer import write_bundle

_DTYPE_NAMES: dict[torch.dtype, DTypeName] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@dataclass(frozen=True, slots=True)
class PackOptions:
    """The options of packing.

    Attributes:
        organ: the organ of the experts.
        checkpoint: the split checkpoint with their backbone.
        from_organ: of a split source, whose bundle to take; by default the organ's own.
        experts: of the source's experts these, in this order; by default all.
        dtype: the dtype to convert experts and gates to; by default unchanged.
        prototype: a file with the organ's prototype; by default the source's, if it has one.
    """

    organ: str
    checkpoint: Path
    from_organ: str | None = None
    experts: Sequence[int] | None = None
    dtype: DTypeName | None = None
    prototype: Path | None = None
    max_file_bytes: int = DEFAULT_MAX_SHARD_BYTES


def pack(
    source: Path,
    destination: Path,
    card: BundleCard,
    options: PackOptions,
    *,
    start: Callable[[int], None] = lambda _: None,
    progress: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Packs a bundle, with a probe. One tensor at a time is in memory, and one expert while the probe is recorded.

    Args:
        source: see `echovlm_ray.checkpoint.pack_source.open_source`.
        destination: the bundle's folder; it appears when it is complete.
        card: the author's fields of the manifest.
        options: the options.
        start: called with the number of bytes to read, before the first.
        progress: called with the bytes of every tensor read.

    Returns:
        The manifest.

    Raises:
        InvalidCheckpointError: the source does not fit, weights are not finite, or a field is missing.
        FileExistsError: the destination exists.
    """
    if destination.exists() or destination.is_symlink():
        raise FileExistsError(f"{destination} exists; bundles are never changed in place")
    target = open_split(options.checkpoint)
    if target.backbone.problems:
        raise InvalidCheckpointError(f"{options.checkpoint}: {first_problems(target.backbone.problems)}")
    shape, digest = target.backbone.known_shape(), target.index.backbone_digest
    to_compare = bytes_to_compare(source)
    start(to_compare)
    found = open_source(source, options.from_organ or options.organ, digest=digest, shape=shape, progress=progress)
    chosen = _chosen(found, options)
    inherited = found.card
    if options.from_organ not in (None, options.organ):
        # Words about another organ.
        inherited = inherited.model_copy(update=dict.fromkeys(("name", "description", "organ_synonyms")))
    known = inherited.over(
        BundleCard(name=f"{target.index.name}-{options.organ}", organ_synonyms=ORGAN_SYNONYMS.get(options.organ, ()))
    )
    prototype = found.prototype if options.prototype is None else read_prototype(options.prototype, shape.hidden_size)
    facts: dict[str, Any] = {
        "organ": options.organ,
        "backbone_digest": digest,
        "num_layers": shape.num_hidden_layers,
        "num_experts": len(chosen),
        "hidden_size": shape.hidden_size,
        "intermediate_size": found.intermediate_size,
        "source_experts": None if found.source_experts is None else [found.source_experts[index] for index in chosen],
        "has_prototype": prototype is not None,
        "probe": probe_sizes(len(chosen)),
        **_dtypes(found, options.dtype),
    }
    description = describe(card.over(known), facts)
    require_space(destination, found.nbytes)
    start(to_compare + found.nbytes)
    destination.absolute().parent.mkdir(parents=True, exist_ok=True)
    norms = target.backbone.folder.tensors
    return write_bundle(
        destination,
        description,
        _Tensors(found, description, chosen, prototype, progress),
        max_file_bytes=options.max_file_bytes,
        norm_weight=lambda layer: load(norms[f"model.layers.{layer}.post_attention_layernorm.weight"]),
    )


def _chosen(found: PackSource, options: PackOptions) -> list[int]:
    if options.experts is None:
        return list(range(found.num_experts))
    chosen = list(options.experts)
    if not chosen or len(set(chosen)) < len(chosen):
        raise InvalidCheckpointError("the experts to pack must be named once each, like --experts 0,2")
    if beyond := [index for index in chosen if not 0 <= index < found.num_experts]:
        raise InvalidCheckpointError(
            f"there is no expert {beyond[0]} to pack; the source has experts 0 to {found.num_experts - 1}"
        )
    return chosen


def _dtypes(found: PackSource, wanted: DTypeName | None) -> dict[str, DTypeName | None]:
    """The dtypes that all experts, and all gates, have or should have."""
    if wanted is not None:
        return {"dtype": wanted, "gate_dtype": None}
    dtypes: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for name, tensor in found.tensors.items():
        dtypes[".experts." in name].add(specification(tensor)[0])
    for of_experts, present in dtypes.items():
        if len(present) > 1:
            part = "experts" if of_experts else "gates"
            raise InvalidCheckpointError(
                f"the {part} have several dtypes ({', '.join(sorted(map(str, present)))}); convert them with --dtype"
            )
    expert_dtype, gate_dtype = (_DTYPE_NAMES[dtypes[of_experts].pop()] for of_experts in (True, False))
    return {"dtype": expert_dtype, "gate_dtype": None if gate_dtype == expert_dtype else gate_dtype}


class _Tensors:
    """Reads a bundle's tensors from the source, and refuses NaN and infinity."""

    def __init__(
        self,
        found: PackSource,
        description: BundleDescription,
        chosen: list[int],
        prototype: StoredTensor | None,
        progress: Callable[[int], None],
    ) -> None:
        """Works out which tensor comes from where."""
        self._chosen = chosen
        self._progress = progress
        self._gates = {gate_tensor(layer): found.tensors[gate_name(layer)] for layer in range(description.num_layers)}
        self._whole: dict[str, StoredTensor] = {}
        for layer in range(description.num_layers):
            names = expert_tensors_of_layer(description, layer)
            for projection in PROJECTIONS:
                for name, expert in zip(names[projection], chosen, strict=True):
                    self._whole[name] = found.tensors[expert_name(layer, expert, f"{projection}_proj")]
        if prototype is not None:
            self._whole[PROTOTYPE_TENSOR] = prototype
        self._dtypes = dict.fromkeys(self._whole, description.torch_dtype)
        self._dtypes |= dict.fromkeys(self._gates, description.gate_torch_dtype)
        self._dtypes[PROTOTYPE_TENSOR] = torch.float32

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor of that name in the bundle."""
        stored = self._gates.get(name) or self._whole[name]
        tensor = load(stored)
        self._progress(stored.nbytes)
        if name in self._gates:
            tensor = tensor[self._chosen]
        tensor = tensor.to(self._dtypes[name])
        if not is_finite(tensor):
            raise InvalidCheckpointError(
                f"{stored.name}: has values that are infinite or not a number in {tensor.dtype}; this was no good "
                "training, or the dtype is too small"
            )
        return tensor
