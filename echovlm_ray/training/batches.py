"""Collates examples into batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from echovlm_ray.training.encode import EncodedExample
from echovlm_ray.training.stream import UnusableExample

# The field of a batch with the reason why it cannot be used.
UNUSABLE = "unusable"


def collate(examples: Sequence[EncodedExample | UnusableExample]) -> dict[str, Any]:
    """Packs examples into one batch without padding, or returns a dictionary with only `UNUSABLE`.

    Returns:
        `input_ids`, `targets`, `target_weights`: 1 × tokens of all examples; `position_ids`: 3 × 1 × tokens;
        `sequence_lengths`: examples; with pictures `pixel_values` and `image_grid_thw`, `pixel_values_videos` and
        `video_grid_thw`, or `picture_embeddings`: tokens of all pictures × hidden. Where the findings of all examples
        are known, `finding_values`, `finding_organs`, `finding_tissue` and `finding_examples`, as
        `echovlm_ray.training.finding_heads.FindingHeads` takes them; visual tokens of images stand before those of
        videos.
    """
    usable = [example for example in examples if isinstance(example, EncodedExample)]
    if len(usable) < len(examples):
        return {UNUSABLE: next(each.reason for each in examples if isinstance(each, UnusableExample))}
    batch = {
        "input_ids": torch.cat([each.input_ids_T for each in usable])[None],
        "targets": torch.cat([each.target_T for each in usable])[None],
        "target_weights": torch.cat([each.weight_T for each in usable])[None],
        "position_ids": torch.cat([each.position_3T for each in usable], dim=1)[:, None],
        "sequence_lengths": torch.tensor([len(each) for each in usable]),
    }
    for is_video, values, grid in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        items = [item for each in usable for item in each.vision if item.is_video == is_video]
        if items:
            batch[values] = torch.from_numpy(np.concatenate([item.patches for item in items]))
            batch[grid] = torch.tensor([item.grid for item in items])
    if all(each.findings is not None for each in usable):
        batch |= _findings(usable)
    if embeddings := [each.embeddings_VD for each in usable if each.embeddings_VD is not None]:
        batch["picture_embeddings"] = torch.cat(embeddings)
    return batch


def _findings(examples: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
    tissue: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    numbers: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for number, example in enumerate(examples):
        assert example.findings is not None
        for item, labels in zip(example.vision, example.findings.tissue, strict=True):
            tissue[item.is_video].append(labels)
            numbers[item.is_video].append(torch.full_like(labels, number))
    found = [each.findings for each in examples if each.findings is not None]
    return {
        "finding_values": torch.stack([each.values_Q for each in found]),
        "finding_organs": torch.tensor([each.organ for each in found]),
        "finding_tissue": torch.cat([*tissue[False], *tissue[True]]),
        "finding_examples": torch.cat([*numbers[False], *numbers[True]]),
    }
