"""Reads a safetensors file through a memory map, checking everything that its header says first.

Tensors are views of the map: nothing is read before it is used, and processes that map the same file share its
pages. The map is copy-on-write, so writing to a tensor never reaches the file. The file must not be shortened while
mapped; the registry never changes a file in place.
"""

import json
import math
import mmap
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from experts.errors import InvalidBundleError
from experts.safetensors_writer import DTYPE_NAMES

# The library's own limit.
MAX_HEADER_BYTES = 100_000_000

_TORCH_TYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies; offsets are from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """One open file.

    Attributes:
        tensors: what the file holds, in the order of the data.
    """

    def __init__(self, path: Path, *, display_name: str | None = None) -> None:
        """Opens the file and checks its header.

        Args:
            path: the file; a link is refused.
            display_name: how errors call it, by default its name.

        Raises:
            InvalidBundleError: not a plain file, truncated, or a header that contradicts itself or the file's size.
        """
        self.name = display_name or path.name
        self._map = _map_file(path, self.name)
        self.tensors = _parse_header(self._map, self.name)

    def tensor(self, name: str) -> torch.Tensor:
        """A view of one tensor.

        Raises:
            InvalidBundleError: there is no such tensor.
        """
        info = self._info(name)
        return self._view(info.dtype, info.start, info.shape)

    def stacked(self, names: Sequence[str]) -> torch.Tensor:
        """Tensors of one shape as one tensor with a new first dimension.

        A view, where the file holds them one after the other in this order; otherwise a copy.

        Raises:
            InvalidBundleError: a tensor is missing, or they differ in dtype or shape.
        """
        infos = [self._info(name) for name in names]
        first = infos[0]
        for name, info in zip(names, infos, strict=True):
            if (info.dtype, info.shape) != (first.dtype, first.shape):
                raise InvalidBundleError(
                    f"{self.name}: {name} is {info.dtype} {list(info.shape)} but {names[0]} is {first.dtype} "
                    f"{list(first.shape)}"
                )
        if all(before.end == after.start for before, after in pairwise(infos)):
            return self._view(first.dtype, first.start, (len(infos), *first.shape))
        return torch.stack([self.tensor(name) for name in names])

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise InvalidBundleError(f"{self.name}: there is no tensor {name}")
        return self.tensors[name]

    def _view(self, dtype: torch.dtype, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).reshape(shape)


def _map_file(path: Path, name: str) -> mmap.mmap:
    try:
        # O_NONBLOCK: a pipe in a file's place must be refused, not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidBundleError(f"{name}: cannot be opened ({error.strerror}); links are not followed") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidBundleError(f"{name}: is not a plain file")
        if status.st_size < 8:
            raise InvalidBundleError(f"{name}: is truncated, {status.st_size} bytes hold no safetensors header")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)


def _looks_pickled(start: bytes) -> bool:
    """Whether a file starts as a pickle of protocol 2 or later does, or as the zip archive that `torch.save` makes."""
    return start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and 2 <= start[1] <= 5)


def _parse_header(content: mmap.mmap, name: str) -> dict[str, TensorInfo]:
    size = len(content)
    length = int.from_bytes(content[:8], "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        if _looks_pickled(content[:4]):
            raise InvalidBundleError(f"{name}: is a pickle and no safetensors file; pickles are never read, convert it")
        raise InvalidBundleError(f"{name}: is truncated or no safetensors file, its header claims {length} bytes")
    try:
        header = json.loads(content[8 : 8 + length].decode(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise InvalidBundleError(f"{name}: the safetensors header is not valid: {error}") from error
    if not isinstance(header, dict):
        raise InvalidBundleError(f"{name}: the safetensors header is not a JSON object")
    header.pop("__metadata__", None)
    data_start = 8 + length
    infos = {key: _tensor_info(name, key, entry, data_start) for key, entry in header.items()}
    ordered = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)))
    position = data_start
    for key, info in ordered.items():
        if info.start != position:
            raise InvalidBundleError(f"{name}: the data of {key} does not start where the tensor before it ends")
        position = info.end
    if position != size:
        reason = "is truncated" if position > size else "has bytes after its last tensor"
        raise InvalidBundleError(f"{name}: {reason}: the header describes {position} bytes, the file has {size}")
    return ordered


def _tensor_info(file: str, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidBundleError(f"{file}: the header's entry of {name} must have dtype, shape and data_offsets")
    dtype = _TORCH_TYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise InvalidBundleError(f"{file}: {name} has the unknown dtype {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise InvalidBundleError(f"{file}: shape and data_offsets of {name} must be lists of sizes from 0")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise InvalidBundleError(
            f"{file}: {name} has {offsets[1] - offsets[0]} bytes, but {entry['dtype']} {shape} takes "
            f"{math.prod(shape) * dtype.itemsize}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice")
    return values
