"""Writes weights in the released layout, tensor by tensor, in one file or in shards with an index."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from echovlm_ray.checkpoint.reader import WEIGHTS_INDEX_NAME, WEIGHTS_NAME, StoredTensor
from experts.bundles.safetensors_writer import DTYPE_NAMES, StreamingWriter

# What transformers and the released checkpoint use.
DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
# transformers refuses files without it.
METADATA = {"format": "pt"}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

Specification = tuple[torch.dtype, tuple[int, ...]]


def specification(stored: StoredTensor) -> Specification:
    """The torch dtype and shape of a stored tensor."""
    return _DTYPES[stored.dtype], stored.shape


def load(stored: StoredTensor) -> torch.Tensor:
    """Reads one stored tensor into memory of its own."""
    dtype, shape = specification(stored)
    if stored.nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(stored.read(), dtype=dtype).reshape(shape)


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256, in hexadecimal, of a tensor's bytes as safetensors stores them."""
    octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(octets.numpy().data).hexdigest()


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Divides tensors, in their order, over files of at most `max_shard_bytes` of tensor bytes.

    A tensor larger than that gets a file of its own.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_released(
    directory: Path,
    tensors: Mapping[str, Specification],
    read: Callable[[str], torch.Tensor],
    *,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Writes `model.safetensors`, or shards and their index when that would be larger than a shard may be.

    Args:
        directory: an existing folder.
        tensors: dtype and shape of every tensor, in the order in which they are laid down.
        read: makes one tensor; called once per name, and its result is dropped before the next call.
        max_shard_bytes: the most tensor bytes in one file, except that a single tensor may be larger.
        progress: called with the bytes of every tensor written.

    Returns:
        name → SHA-256 of the tensor's bytes.
    """
    sizes = {name: _nbytes(dtype, shape) for name, (dtype, shape) in tensors.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    files = _file_names(len(shards))
    digests: dict[str, str] = {}
    for file, names in zip(files, shards, strict=True):
        with StreamingWriter(directory / file, {name: tensors[name] for name in names}, METADATA) as writer:
            for name in writer.order:
                tensor = read(name)
                digests[name] = tensor_digest(tensor)
                writer.write(name, tensor)
                progress(sizes[name])
                del tensor
    if len(files) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return digests


def _file_names(count: int) -> Sequence[str]:
    if count == 1:
        return [WEIGHTS_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    elements = 1
    for size in shape:
        elements *= size
    return elements * dtype.itemsize
