"""Reads checkpoints in safetensors: headers first, then one tensor at a time.

Nothing is mapped into memory, so a process that walks through a checkpoint never holds more than one tensor of it.
The format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the tensors' bytes).
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echovlm_ray.checkpoint.layout import InvalidCheckpointError

WEIGHTS_NAME = "model.safetensors"
WEIGHTS_INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"

# Bytes of one element, by the format's own dtype names.
ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
# The format's own limit; a longer header is an attack or an accident.
_MAX_HEADER_BYTES = 100_000_000
# A real index of a thousand layers stays far below.
_MAX_JSON_BYTES = 64_000_000
_CHUNK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor's bytes lie."""

    name: str
    path: Path
    # The format's spelling: F32, BF16, …
    dtype: str
    shape: tuple[int, ...]
    # From the file's first byte.
    offset: int
    nbytes: int

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def read(self) -> bytearray:
        """The tensor's bytes.

        Raises:
            InvalidCheckpointError: the file ends before the tensor does.
        """
        content = bytearray(self.nbytes)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            view, done = memoryview(content), 0
            while done < self.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise InvalidCheckpointError(f"{self.path}: the file ends inside {self.name}; fetch it again")
                done += count
        return content

    def sha256(self) -> str:
        """SHA-256, in hexadecimal, of the tensor's bytes, read in small pieces."""
        digest, remaining = hashlib.sha256(), self.nbytes
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while remaining:
                piece = file.read(min(remaining, _CHUNK_BYTES))
                if not piece:
                    raise InvalidCheckpointError(f"{self.path}: the file ends inside {self.name}; fetch it again")
                digest.update(piece)
                remaining -= len(piece)
        return digest.hexdigest()


@dataclass(slots=True)
class TensorFolder:
    """What the headers of a folder's weights say, and what is wrong with them."""

    directory: Path
    # Sorted by name.
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def dtypes(self) -> list[str]:
        """The element types that occur, sorted."""
        return sorted({tensor.dtype for tensor in self.tensors.values()})


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads and checks the header of one safetensors file.

    Raises:
        InvalidCheckpointError: truncated, not safetensors, or a header that contradicts itself or the file's size.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > _MAX_HEADER_BYTES:
            raise InvalidCheckpointError(f"{path.name}: not a safetensors file")
        if 8 + length > size:
            raise InvalidCheckpointError(f"{path.name}: truncated inside its header; fetch it again")
        content = file.read(length)
    try:
        header = json.loads(content, object_pairs_hook=_without_repetition)
        if not isinstance(header, dict):
            raise ValueError("the header is no object")
        header.pop("__metadata__", None)
        tensors = {name: _entry(name, path, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidCheckpointError(f"{path.name}: not a valid safetensors header: {error}") from None
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise InvalidCheckpointError(f"{path.name}: the bytes of {tensor.name} overlap others or leave a gap")
        end += tensor.nbytes
    if end > size:
        raise InvalidCheckpointError(f"{path.name}: truncated: {size:,} bytes of {end:,}; fetch it again")
    if end < size:
        raise InvalidCheckpointError(f"{path.name}: {size - end:,} bytes follow the last tensor")
    return tensors


def read_tensor_folder(directory: Path) -> TensorFolder:
    """Reads the headers of a folder in the released layout, one file or sharded with an index; collects problems."""
    folder = TensorFolder(directory)
    single, index = directory / WEIGHTS_NAME, directory / WEIGHTS_INDEX_NAME
    if index.is_file():
        weight_map = _read_weight_map(index, folder.problems)
        _read_shards(folder, weight_map)
        if single.is_file() and WEIGHTS_NAME not in weight_map.values():
            folder.problems.append(f"both {WEIGHTS_NAME} and {WEIGHTS_INDEX_NAME} exist: remove the old one")
    elif single.is_file():
        _read_file(folder, single, None)
    else:
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors" if pickles else ""
        folder.problems.append(f"no weights: neither {WEIGHTS_NAME} nor {WEIGHTS_INDEX_NAME} is there{hint}")
    folder.tensors = dict(sorted(folder.tensors.items()))
    return folder


def read_config(directory: Path) -> dict[str, Any]:
    """Parses a folder's config.json.

    Raises:
        InvalidCheckpointError: it is missing or no JSON object.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise InvalidCheckpointError(f"{directory}: no {CONFIG_NAME}")
    try:
        config = _read_json(path)
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidCheckpointError(f"{path}: must be a JSON object")
    return config


def differences(stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is missing, unexpected, misshapen or of an unusable dtype; empty when all is right."""
    problems = [
        f"{name}: is {list(stored[name].shape)}, but config.json makes it {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    problems += [f"{name}: missing" for name in expected if name not in stored]
    problems += [f"{name}: unexpected, no EchoVLM of this config has it" for name in stored if name not in expected]
    problems += [
        f"{name}: {tensor.dtype} weights are not supported; convert to BF16, F16 or F32"
        for name, tensor in stored.items()
        if tensor.dtype not in ("F32", "BF16", "F16")
    ]
    return problems


def _read_json(path: Path) -> Any:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"larger than {_MAX_JSON_BYTES:,} bytes")
    return json.loads(path.read_bytes())


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _entry(name: str, path: Path, data_start: int, entry: dict[str, Any]) -> StoredTensor:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in ITEM_SIZES:
        raise ValueError(f"{name} has the unknown dtype {dtype!r}")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name} has a negative or fractional size")
    if end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
        raise ValueError(f"{name} has {end - begin} bytes, which does not fit {dtype} {list(shape)}")
    return StoredTensor(name, path, dtype, shape, data_start + begin, end - begin)


def _read_weight_map(index: Path, problems: list[str]) -> dict[str, str]:
    try:
        weight_map = _read_json(index)["weight_map"]
        entries = dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        problems.append(f"{index.name}: not an index: it needs a JSON object with a weight_map")
        return {}
    sound: dict[str, str] = {}
    for name, file in entries.items():
        # A shard lies in the same folder: an index must not be able to point elsewhere.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            problems.append(f"{index.name}: {name} lies in {file!r}, which is not a safetensors file of this folder")
        else:
            sound[name] = file
    return sound


def _shards(weight_map: Mapping[str, str]) -> Iterator[tuple[str, set[str]]]:
    for file in sorted(set(weight_map.values())):
        yield file, {name for name, where in weight_map.items() if where == file}


def _read_shards(folder: TensorFolder, weight_map: Mapping[str, str]) -> None:
    for file, names in _shards(weight_map):
        path = folder.directory / file
        if path.is_file():
            _read_file(folder, path, names)
        else:
            folder.problems.append(f"{file}: named by {WEIGHTS_INDEX_NAME} for {len(names)} tensors, but not there")


def _read_file(folder: TensorFolder, path: Path, names: set[str] | None) -> None:
    """Adds a file's tensors; `names` are those that the index expects in it, None without an index."""
    folder.files.append(path)
    try:
        tensors = read_header(path)
    except InvalidCheckpointError as error:
        folder.problems.append(str(error))
        return
    if names is not None:
        folder.problems += [
            f"{path.name}: {WEIGHTS_INDEX_NAME} expects {name} in it" for name in sorted(names - set(tensors))
        ]
        folder.problems += [
            f"{path.name}: holds {name}, which {WEIGHTS_INDEX_NAME} does not place there"
            for name in sorted(set(tensors) - names)
        ]
        tensors = {name: tensor for name, tensor in tensors.items() if name in names}
    folder.tensors |= tensors
