"""Reads a safetensors file through a memory map, after its header was checked.

Tensors are views of the mapping: data is read on first use, and processes that map the same file share its pages. The
mapping is copy-on-write, so writing to a tensor does not change the file. The file must not be truncated while mapped;
the registry never changes a file in place.
"""

import math
import mmap
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from experts.bundles.safetensors_header import InvalidHeaderError, StoredInfo, read_header
from experts.bundles.safetensors_writer import DTYPE_NAMES
from experts.errors import InvalidBundleError

_TORCH_TYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The location of one tensor; offsets are from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """One open file.

    Attributes:
        tensors: the file's tensors in the order of the data.
    """

    def __init__(self, path: Path, *, display_name: str | None = None) -> None:
        """Opens the file and checks its header.

        Args:
            path: the file; a link is refused.
            display_name: its name in errors; by default the file's name.

        Raises:
            InvalidBundleError: it is not a plain file, is truncated, or its header is invalid.
        """
        self.name = display_name or path.name
        self._map, header = _open(path, self.name)
        self.tensors = {name: _tensor_info(self.name, name, stored) for name, stored in header.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """A view of one tensor.

        Raises:
            InvalidBundleError: there is no such tensor.
        """
        info = self._info(name)
        return self._view(info.dtype, info.start, info.shape)

    def stacked(self, names: Sequence[str]) -> torch.Tensor:
        """Tensors of one shape as one tensor with a new first dimension.

        A view if they are adjacent in the file in this order; otherwise a copy.

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


def _open(path: Path, name: str) -> tuple[mmap.mmap, dict[str, StoredInfo]]:
    try:
        # O_NONBLOCK: a pipe must be refused instead of waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidBundleError(f"{name}: cannot be opened ({error.strerror}); links are not followed") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidBundleError(f"{name}: is not a plain file")
        header = read_header(descriptor)
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY), header
    except InvalidHeaderError as error:
        raise InvalidBundleError(f"{name}: {error}") from None
    finally:
        os.close(descriptor)


def _tensor_info(file: str, name: str, stored: StoredInfo) -> TensorInfo:
    dtype = _TORCH_TYPES.get(stored.dtype)
    if dtype is None:
        raise InvalidBundleError(f"{file}: {name} has the unknown dtype {stored.dtype!r}")
    return TensorInfo(dtype, stored.shape, stored.start, stored.end)
