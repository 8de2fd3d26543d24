"""The header of a safetensors file: its tensors and their offsets. The library validates it.

`safetensors.safe_open` refuses headers longer than 100 MB or than the file, invalid JSON, sizes that overflow, and
tensors that overlap, leave gaps or do not end with the file. It does not return offsets and allows duplicate names, so
the header is parsed once more for these two.
"""

import json
import os
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, safe_open


class InvalidHeaderError(ValueError):
    """A file is not a safetensors file, is damaged, or has a duplicate name."""


@dataclass(frozen=True, slots=True)
class StoredInfo:
    """One tensor in the header.

    Attributes:
        dtype: the format's name: F32, BF16, …
        shape: its sizes.
        start: its first byte, from the start of the file.
        end: the byte after its last one.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(descriptor: int) -> dict[str, StoredInfo]:
    """Reads the header of an open file, without reading or mapping its tensors.

    Args:
        descriptor: a plain file, open for reading; its position is neither used nor changed.

    Returns:
        name → tensor, in the order of the data.

    Raises:
        InvalidHeaderError: the text names the cause, without the file.
    """
    try:
        # By descriptor, because the path may refer to another file now.
        with safe_open(f"/dev/fd/{descriptor}", framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            tensors = {name: (found.get_dtype(), tuple(found.get_shape())) for name, found in slices.items()}
    except SafetensorError as error:
        if _looks_pickled(os.pread(descriptor, 4, 0)):
            raise InvalidHeaderError(
                "is a pickle and no safetensors file; pickles are never read, convert it"
            ) from None
        raise InvalidHeaderError(
            f"is truncated or no valid safetensors file ({error}); fetch it or make it again"
        ) from None
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    try:
        header = json.loads(os.pread(descriptor, length, 8), object_pairs_hook=_distinct)
    except ValueError as error:
        raise InvalidHeaderError(f"the safetensors header is not valid: {error}") from None
    infos = {}
    for name, (dtype, shape) in tensors.items():
        # The library also takes a list of the three values.
        if not isinstance(header[name], dict):
            raise InvalidHeaderError(f"the header's entry of {name} must be an object with dtype, shape, data_offsets")
        start, end = header[name]["data_offsets"]
        infos[name] = StoredInfo(dtype, shape, 8 + length + start, 8 + length + end)
    return infos


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _looks_pickled(start: bytes) -> bool:
    """Whether a file starts like a pickle (protocol 2 or later) or like a zip archive of `torch.save`."""
    return start.startswith((b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6))))
