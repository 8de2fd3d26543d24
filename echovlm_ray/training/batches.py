"""Examples put together to what the model takes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from echovlm_ray.training.encode import IGNORED, EncodedExample
from echovlm_ray.training.stream import UnusableExample

# The field of a batch that says why it cannot be used.
UNUSABLE = "unusable"


class Collator:
    """Pads on the right. Of use to a `DataLoader`; it can be pickled."""

    def __init__(self, pad_token_id: int) -> None:
        """Takes the token that fills up shorter rows."""
        self._pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[EncodedExample | UnusableExample]) -> dict[str, Any]:
        """One batch, or a dictionary with `UNUSABLE` alone.

        Returns:
            `input_ids`, `attention_mask`, `targets`, `target_weights`: batch × tokens; `position_ids`: 3 × batch ×
            tokens; with pictures `pixel_values` and `image_grid_thw`, `pixel_values_videos` and `video_grid_thw`,
            or `picture_embeddings`: tokens of all pictures × hidden.
        """
        usable = [example for example in examples if isinstance(example, EncodedExample)]
        if len(usable) < len(examples):
            return {UNUSABLE: next(each.reason for each in examples if isinstance(each, UnusableExample))}
        ids, targets, weights = (
            pad_sequence([getattr(each, name) for each in usable], batch_first=True, padding_value=value)
            for name, value in (("input_ids_T", self._pad_token_id), ("target_T", IGNORED), ("weight_T", 0.0))
        )
        masks = pad_sequence([torch.ones(len(each), dtype=torch.int64) for each in usable], batch_first=True)
        # 1 at padding, as in the reference.
        positions = pad_sequence([each.position_3T.T for each in usable], batch_first=True, padding_value=1)
        batch = {
            "input_ids": ids,
            "attention_mask": masks,
            "targets": targets,
            "target_weights": weights,
            "position_ids": positions.permute(2, 0, 1).contiguous(),
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
