"""Finds the routed experts to pack: in a split checkpoint, a released one, or a training's output."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from echovlm_ray.checkpoint.bundle_card import BundleCard
from echovlm_ray.checkpoint.layout import InvalidCheckpointError, is_split_folder
from echovlm_ray.checkpoint.reader import CONFIG_NAME, StoredTensor, differences, read_header
from echovlm_ray.checkpoint.released import first_problems, open_released
from echovlm_ray.checkpoint.schema import (
    ModelShape,
    backbone_digest,
    expert_name,
    gate_name,
    is_routed,
)
from echovlm_ray.checkpoint.split_folder import open_split
from experts.bundles.layout import PROTOTYPE_TENSOR, expert_tensor, gate_tensor
from experts.bundles.manifest import PROJECTIONS


@dataclass(frozen=True)
class PackSource:
    """The routed experts and gates of all layers, under their released names.

    Attributes:
        tensors: released name → where it lies.
        num_experts: how many experts each layer has.
        card: the source's metadata about them.
        source_experts: their indices in the released checkpoint, if known.
        prototype: the organ's prototype, if the source has one.
    """

    tensors: Mapping[str, StoredTensor]
    num_experts: int
    card: BundleCard = field(default_factory=BundleCard)
    source_experts: tuple[int, ...] | None = None
    prototype: StoredTensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def intermediate_size(self) -> int:
        """The inner size of an expert."""
        return self.tensors[expert_name(0, 0, "gate_proj")].shape[0]


def open_source(
    source: Path, organ: str, *, digest: str, shape: ModelShape, progress: Callable[[int], None]
) -> PackSource:
    """Opens a source of experts, and checks that they fit the backbone.

    Args:
        source: a split checkpoint's folder, a released one's, or a file or folder of safetensors with nothing but
            `model.layers.{i}.moe.experts.{e}.…` and `model.layers.{i}.moe.gate.weight`.
        organ: of a split checkpoint, whose bundle.
        digest: the backbone's.
        shape: the backbone's sizes.
        progress: called with the bytes of every tensor read to compare backbones.

    Raises:
        InvalidCheckpointError: it holds no such experts, or they are of another backbone.
        InvalidBundleError: the split checkpoint's bundle is damaged.
    """
    if source.is_dir() and is_split_folder(source):
        found = _of_split(source, organ, digest)
    elif source.is_dir() and (source / CONFIG_NAME).is_file() and not _has_only_experts(source):
        found = _of_released(source, digest, progress)
    else:
        found = _of_training(source)
    _check_shapes(source, found, shape)
    return found


def bytes_to_compare(source: Path) -> int:
    """How many bytes `open_source` reads beyond headers: the whole backbone of a released checkpoint."""
    if is_split_folder(source) or not (source / CONFIG_NAME).is_file() or _has_only_experts(source):
        return 0
    tensors = open_released(source).folder.tensors
    return sum(tensor.nbytes for name, tensor in tensors.items() if not is_routed(name))


def read_prototype(path: Path, hidden_size: int) -> StoredTensor:
    """Reads a prototype from a safetensors file.

    Raises:
        InvalidCheckpointError: it holds anything else, or a prototype of another size or dtype.
    """
    tensors = _read_file(path)
    if set(tensors) != {PROTOTYPE_TENSOR}:
        raise InvalidCheckpointError(f"{path}: must hold the one tensor {PROTOTYPE_TENSOR}, and nothing else")
    prototype = tensors[PROTOTYPE_TENSOR]
    if (prototype.dtype, prototype.shape) != ("F32", (hidden_size,)):
        raise InvalidCheckpointError(
            f"{path}: {PROTOTYPE_TENSOR} is {prototype.dtype} {list(prototype.shape)}; it must be F32 [{hidden_size}]"
        )
    return prototype


def _of_split(source: Path, organ: str, digest: str) -> PackSource:
    folder = open_split(source)
    folder.index.entry(organ)
    if folder.problems:
        raise InvalidCheckpointError(f"{source}: {first_problems(folder.problems)}")
    if folder.index.backbone_digest != digest:
        raise InvalidCheckpointError(
            f"{source} has the backbone {folder.index.backbone_digest[:12]}…, and the bundle is to be for "
            f"{digest[:12]}…: experts work with no other backbone than theirs"
        )
    bundle = folder.organs[organ].bundle
    # A damaged file must not become a bundle with valid digests.
    bundle.verify()
    manifest = bundle.manifest
    stored = folder.organs[organ].tensors
    tensors = {gate_name(layer): stored[gate_tensor(layer)] for layer in range(manifest.num_layers)}
    for layer in range(manifest.num_layers):
        for expert in range(manifest.num_experts):
            for projection in PROJECTIONS:
                name = expert_name(layer, expert, f"{projection}_proj")
                tensors[name] = stored[expert_tensor(layer, expert, projection)]
    said = manifest.model_dump(include=set(BundleCard.model_fields) - {"version", "eval_metrics"})
    prototype = None
    if manifest.has_prototype:
        prototype = next(
            found[PROTOTYPE_TENSOR]
            for path in bundle.locations.values()
            if PROTOTYPE_TENSOR in (found := read_header(path))
        )
    return PackSource(tensors, manifest.num_experts, BundleCard(**said), manifest.source_experts, prototype)


def _of_released(source: Path, digest: str, progress: Callable[[int], None]) -> PackSource:
    checkpoint = open_released(source)
    tensors = checkpoint.folder.tensors
    described = {}
    for name, tensor in tensors.items():
        if not is_routed(name):
            described[name] = (tensor.dtype, tensor.shape, tensor.sha256())
            progress(tensor.nbytes)
    found = backbone_digest(checkpoint.config, described)
    if found != digest:
        raise InvalidCheckpointError(
            f"{source} has the backbone {found[:12]}…, and the bundle is to be for {digest[:12]}…: experts work with "
            "no other backbone than theirs. If only the experts were trained, give a file with nothing but them"
        )
    num_experts = checkpoint.known_shape().num_experts
    routed = {name: tensor for name, tensor in tensors.items() if is_routed(name)}
    return PackSource(routed, num_experts, source_experts=tuple(range(num_experts)))


def _of_training(source: Path) -> PackSource:
    tensors: dict[str, StoredTensor] = {}
    for path in _files(source):
        for name, tensor in _read_file(path).items():
            if not is_routed(name):
                raise InvalidCheckpointError(
                    f"{path.name}: holds {name}, which is no routed expert or gate: a bundle cannot carry it, and "
                    "experts that were trained together with it do not work without it"
                )
            if name in tensors:
                raise InvalidCheckpointError(f"{path.name}: {name} is also in {tensors[name].path.name}")
            tensors[name] = tensor
    gate = tensors.get(gate_name(0))
    if gate is None or expert_name(0, 0, "gate_proj") not in tensors:
        raise InvalidCheckpointError(
            f"{source}: has no {gate_name(0)} and {expert_name(0, 0, 'gate_proj')}; give what holds an organ's experts "
            "and gate rows under their released names"
        )
    return PackSource(tensors, gate.shape[0])


def _has_only_experts(folder: Path) -> bool:
    return all(is_routed(name) for path in _files(folder) for name in _read_file(path))


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise InvalidCheckpointError(f"{source}: there is no such file or folder")
    files = sorted(source.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for path in source.glob(pattern))
        hint = f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors" if pickles else ""
        raise InvalidCheckpointError(f"{source}: holds no safetensors file{hint}")
    return files


def _read_file(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise InvalidCheckpointError(f"{path}: there is no such file")
    return read_header(path)


def _check_shapes(source: Path, found: PackSource, shape: ModelShape) -> None:
    hidden, inner = shape.hidden_size, found.intermediate_size
    expected: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.num_hidden_layers):
        expected[gate_name(layer)] = (found.num_experts, hidden)
        for expert in range(found.num_experts):
            expected[expert_name(layer, expert, "gate_proj")] = (inner, hidden)
            expected[expert_name(layer, expert, "up_proj")] = (inner, hidden)
            expected[expert_name(layer, expert, "down_proj")] = (hidden, inner)
    if problems := differences(found.tensors, expected):
        raise InvalidCheckpointError(
            f"{source}: does not fit the backbone of {shape.num_hidden_layers} layers and hidden size {hidden}: "
            f"{first_problems(problems)}"
        )
