"""Writes a safetensors file tensor by tensor, so that memory does not grow with the file.

The format (https://huggingface.co/docs/safetensors): the header's length as 8 little-endian bytes, a JSON header
with every tensor's dtype, shape and offsets, then the data without gaps. The library's own `save_file` needs all
tensors at once.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

# The data starts at a multiple of this. As tensors are sorted by element size, all of them are aligned.
ALIGNMENT = 64

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """The size and digest of a finished file."""

    path: Path
    sha256: str
    size: int


class StreamingWriter:
    """Writes one file; it appears under its name only when `close` succeeds.

    Equal tensors and metadata give equal bytes. As a context manager it closes the file at the end of the block, and
    deletes it if the block raises; `written` is the result of `close`.

    Attributes:
        order: the names in the order in which they must be written: as given, but tensors with larger elements first,
            so that every tensor is aligned.
        written: the finished file, once closed.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Writes the header.

        Args:
            path: the file to write. Its folder must exist; a file of this name is replaced.
            tensors: dtype and shape of every tensor.
            metadata: strings for the header; transformers needs {"format": "pt"}.

        Raises:
            ValueError: a dtype that safetensors does not have.
        """
        for name, (dtype, _) in tensors.items():
            if dtype not in DTYPE_NAMES:
                raise ValueError(f"{path.name}: {name} is {dtype}, which this writer cannot store")
        self.path = path
        self.order = tuple(sorted(tensors, key=lambda name: -tensors[name][0].itemsize))
        self.written: WrittenFile | None = None
        self._tensors = {name: (tensors[name][0], tuple(tensors[name][1])) for name in self.order}
        self._next = 0
        self._digest = hashlib.sha256()
        self._size = 0
        self._partial = path.with_name(f".{path.name}.{os.urandom(8).hex()}.partial")
        self._file = self._partial.open("wb")
        self._append(_header(self._tensors, metadata))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next tensor of `order`.

        Raises:
            ValueError: it is not the next tensor of `order`, or its dtype or shape differs.
        """
        expected = self.order[self._next] if self._next < len(self.order) else None
        if name != expected:
            turn = f"{expected} comes next" if expected else "all tensors are written"
            raise ValueError(f"{self.path.name}: {name} cannot be written now, {turn}")
        dtype, shape = self._tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{self.path.name}: {name} was announced as {dtype} {list(shape)} and is {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._append(octets.numpy().data)
        self._next += 1

    def close(self) -> WrittenFile:
        """Finishes the file and renames it to its path.

        Raises:
            ValueError: tensors are missing; the file is deleted.
        """
        if self.written is not None:
            return self.written
        if self._next < len(self.order):
            self.abort()
            raise ValueError(f"{self.path.name}: {self.order[self._next]} was announced and not written")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self.path)
        self.written = WrittenFile(self.path, self._digest.hexdigest(), self._size)
        return self.written

    def abort(self) -> None:
        """Deletes the unfinished file."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _append(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)


def _header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    # The format allows blanks after the header.
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
