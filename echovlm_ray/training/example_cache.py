"""Caches examples as tokens with the embeddings of their images by a frozen vision tower, one file each.

Reading, decoding and encoding pictures is most of the work when only experts learn, and gives the same every epoch.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from echovlm_ray.model.vision_tower import EchoVLMVisionTower
from echovlm_ray.training.encode import EncodedExample, EncodedSource
from echovlm_ray.training.errors import TrainingError
from echovlm_ray.training.examples import ExampleError
from echovlm_ray.training.skipped import SkippedExamples, reason_of

_FIELDS = {"input_ids": "input_ids_T", "targets": "target_T", "weights": "weight_T", "positions": "position_3T"}


class CachedExamples:
    """The examples that `cache_examples` wrote; an `EncodedSource`. Random choices are those of epoch 0."""

    def __init__(self, source: EncodedSource, folder: Path) -> None:
        """Takes the source of the examples, and the cache's folder."""
        self._source = source
        self._folder = folder

    def __len__(self) -> int:
        """How many examples an epoch has."""
        return len(self._source)

    def place(self, index: int) -> str:
        return self._source.place(index)

    def encoded(self, index: int, epoch: int) -> EncodedExample:
        """See `EncodedSource.encoded`; one that could not be used raises why, as when it was read."""
        path = _path(self._folder, index)
        if not path.is_file():
            self._source.encoded(index, 0)
            raise ExampleError(f"{self.place(index)}: was not kept; remove {self._folder} to have it made again")
        tensors = load_file(path)
        ids, targets, weights, positions = (tensors[name] for name in _FIELDS)
        return EncodedExample(ids, targets, weights, positions, embeddings_VD=tensors.get("embeddings"))


@torch.no_grad()
def cache_examples(
    source: EncodedSource,
    tower: EchoVLMVisionTower,
    folder: Path,
    *,
    skip_unusable: bool,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Writes every example that is not cached yet.

    Args:
        source: the examples.
        tower: frozen, in evaluation mode.
        folder: the cache's folder; private, because it contains data of the data set.
        skip_unusable: skip and log unusable examples.
        progress: called with 1 for every example.

    Returns:
        how many examples were skipped.

    Raises:
        ExampleError: an example cannot be used and must not be skipped.
        TrainingError: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    skipped = SkippedExamples()
    for index in range(len(source)):
        path = _path(folder, index)
        if not path.is_file():
            try:
                example = source.encoded(index, 0)
            except ExampleError as error:
                reason = reason_of(error, source.place(index))
                if not skip_unusable:
                    raise ExampleError(reason) from None
                skipped.add(index, reason)
            else:
                _write(path, example, tower)
        progress(1)
    return len(skipped)


def pooled_direction(embeddings_VD: torch.Tensor) -> torch.Tensor:
    """The unit vector of pooled visual embeddings: hidden size, float32."""
    return torch.nn.functional.normalize(embeddings_VD.float().mean(dim=0), dim=0)


def pooled_mean(source: CachedExamples) -> torch.Tensor | None:
    """The mean direction of the images' pooled features: hidden size, float32; None without images.

    Each example counts alike: the mean of the unit vectors of their pooled embeddings, which the organ gate compares
    with a request's by cosine similarity (`router.gating.organ_gate`).
    """
    directions = []
    for index in range(len(source)):
        try:
            embeddings_VD = source.encoded(index, 0).embeddings_VD
        except ExampleError:
            continue
        if embeddings_VD is not None:
            directions.append(pooled_direction(embeddings_VD))
    return torch.stack(directions).mean(dim=0) if directions else None


def _write(path: Path, example: EncodedExample, tower: EchoVLMVisionTower) -> None:
    tensors = {name: getattr(example, field).contiguous() for name, field in _FIELDS.items()}
    if example.vision:
        device = next(tower.parameters()).device
        embeddings = [
            tower(
                torch.from_numpy(item.patches).to(device), grid_thw=torch.tensor([item.grid], device=device)
            ).pooler_output
            for item in example.vision
        ]
        tensors["embeddings"] = torch.cat(embeddings).float().cpu()
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial)
    except SafetensorError as error:
        partial.unlink(missing_ok=True)
        raise TrainingError(
            f"{path} could not be written ({error}): make room on that disk, and go on with --resume"
        ) from None
    partial.replace(path)


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:07}.safetensors"
