"""Reads checkpoints in safetensors: headers first, then one tensor at a time.

Nothing is mapped into memory, so a process that reads a checkpoint has at most one tensor of it in memory.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echovlm_ray.checkpoint.layout import InvalidCheckpointError
from experts.bundles import safetensors_header

WEIGHTS_NAME = "model.safetensors"
WEIGHTS_INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"

# A real index of a thousand layers stays far below.
_MAX_JSON_BYTES = 64_000_000
_CHUNK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The location of one tensor's bytes."""

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
    """The headers of a folder's weights, and their problems."""

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
    """Reads and checks the header of one safetensors file, in the order of the data.

    Raises:
        InvalidCheckpointError: truncated, not safetensors, or a header that contradicts itself or the file's size.
    """
    try:
        with path.open("rb") as file:
            header = safetensors_header.read_header(file.fileno())
    except safetensors_header.InvalidHeaderError as error:
        raise InvalidCheckpointError(f"{path.name}: {error}") from None
    return {
        name: StoredTensor(name, path, stored.dtype, stored.shape, stored.start, stored.end - stored.start)
        for name, stored in header.items()
    }


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
    """The tensors that are missing, unexpected, or of a wrong shape or dtype; empty if there are none."""
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


def _read_weight_map(index: Path, problems: list[str]) -> dict[str, str]:
    try:
        weight_map = _read_json(index)["weight_map"]
        entries = dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        problems.append(f"{index.name}: not an index: it needs a JSON object with a weight_map")
        return {}
    sound: dict[str, str] = {}
    for name, file in entries.items():
        # A shard must be in the same folder: an index must not refer to other folders.
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
