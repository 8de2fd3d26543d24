"""What these tests share: checkpoints that break in real ways, and reading them by the library itself."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from echovlm_ray.checkpoint.groups import clone_groups, partition_groups
from echovlm_ray.checkpoint.layout import ORGANS, CheckpointIndex
from echovlm_ray.checkpoint.split import Labels, split

StateDict = dict[str, torch.Tensor]


def state_dict_of(directory: Path) -> StateDict:
    """By the library itself, so that a test does not trust the code that it tests."""
    tensors: StateDict = {}
    for path in sorted(directory.glob("*.safetensors")):
        part = load_file(path)
        assert not tensors.keys() & part.keys()
        tensors |= part
    return tensors


def bit_identical(left: StateDict, right: StateDict) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8))
        for name in left
    )


def make_split(
    source: Path,
    destination: Path,
    *,
    organs: tuple[str, ...] = ORGANS,
    groups: dict[str, list[int]] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    labels: Labels | None = None,
) -> CheckpointIndex:
    """Splits: copies for organs, or a partition when groups are given."""
    result = split(
        source,
        destination,
        groups=lambda count: clone_groups(organs, count) if groups is None else partition_groups(groups, count),
        routing="organs" if groups is None else "flat",
        labels=labels or Labels(name="test"),
        max_shard_bytes=max_shard_bytes,
    )
    return result.index


class Edit:
    """Changes a checkpoint folder in ways that real ones go wrong."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.weights = directory / "model.safetensors"

    def config(self, **changes: object) -> None:
        path = self.directory / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    def tensors(self, change: Callable[[StateDict], object]) -> None:
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights, {"format": "pt"})

    def shard(self, count: int = 3) -> dict[str, str]:
        """Spreads the weights over several files with an index; returns the index's map."""
        tensors = load_file(self.weights)
        self.weights.unlink()
        names = sorted(tensors)
        files = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        for number, file in enumerate(files):
            save_file({name: tensors[name] for name in names[number::count]}, self.directory / file, {"format": "pt"})
        weight_map = {name: files[position % count] for position, name in enumerate(names)}
        self.index(weight_map)
        return weight_map

    def index(self, weight_map: dict[str, str]) -> None:
        content = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (self.directory / "model.safetensors.index.json").write_text(json.dumps(content))
