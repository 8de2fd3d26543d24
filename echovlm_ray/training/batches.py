"""Examples put together to what the model takes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from echovlm_ray.training.encode import EncodedExample
from echovlm_ray.training.stream import UnusableExample

# The field of a batch that says why it cannot be used.
UNUSABLE = "unusable"


def collate(examples: Sequence[EncodedExample | UnusableExample]) -> dict[str, Any]:
    """One batch, or a dictionary with `UNUSABLE` alone. The examples lie one after the other: nothing is padded.

    Returns:
        `input_ids`, `targets`, `target_weights`: 1 × tokens of all examples; `position_ids`: 3 × 1 × tokens;
        `sequence_lengths`: examples; with pictures `pixel_values` and `image_grid_thw`, `pixel_values_videos` and
        `video_grid_thw`, or `picture_embeddings`: tokens of all pictures × hidden.
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
    if embeddings := [each.embeddings_VD for each in usable if each.embeddings_VD is not None]:
        batch["picture_embeddings"] = torch.cat(embeddings)
    return batch
