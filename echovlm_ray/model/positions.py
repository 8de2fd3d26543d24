"""Multimodal rotary positions (M-RoPE, Qwen2-VL, arXiv 2409.12191): each token's position in time, height and width.

Text advances all three by one per token. An image's tokens are a grid that starts after the text, and the text
continues after the grid's largest coordinate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from echovlm_ray.model.configuration import EchoVLMConfig

# Time, height and width of an image or a video, in patches.
Grid = tuple[int, int, int]


class PlaceholderMismatchError(ValueError):
    """A prompt's placeholder tokens do not match its images. The text has both counts."""


@dataclass(slots=True)
class _Pictures:
    """An iterator over the images of one kind."""

    kind: str
    token_id: int
    grids: Sequence[Grid]
    merge: int
    used: int = 0

    def tokens(self, grid: Grid) -> int:
        return grid[0] * (grid[1] // self.merge) * (grid[2] // self.merge)

    def take(self) -> Grid:
        grid = self.grids[self.used]
        self.used += 1
        return grid

    def check_count(self, found: int) -> None:
        needed = sum(self.tokens(grid) for grid in self.grids)
        if found != needed:
            raise PlaceholderMismatchError(
                f"the prompt has {found} {self.kind} placeholder tokens (id {self.token_id}), but the "
                f"{len(self.grids)} {self.kind}(s) given fill {needed}; let the processor write the placeholders, or "
                f"give the {self.kind}s that the prompt mentions"
            )


def mrope_positions(
    input_ids_T: torch.Tensor, image_grids: Sequence[Grid], video_grids: Sequence[Grid], config: EchoVLMConfig
) -> tuple[torch.Tensor, int]:
    """Positions of one prompt without padding.

    Args:
        input_ids_T: the prompt's token ids.
        image_grids: (time, height, width) in patches of each image, in the order of the prompt.
        video_grids: the same of each video.
        config: names the placeholder tokens and the spatial merge size.

    Returns:
        position_ids_3T, int64, and the delta: the token at index i after the prompt has the position `i + delta`.

    Raises:
        PlaceholderMismatchError: the number of placeholder tokens does not match the images.
    """
    images, videos = _pictures(image_grids, video_grids, config)
    _check_counts(input_ids_T, images, videos)
    positions_3T = _row_positions(input_ids_T.tolist(), images, videos)
    return positions_3T.to(input_ids_T.device), _delta(positions_3T, positions_3T.shape[1])


def batch_positions(
    input_ids_BT: torch.Tensor,
    attention_mask_BT: torch.Tensor | None,
    image_grids: torch.Tensor | None,
    video_grids: torch.Tensor | None,
    config: EchoVLMConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of a padded batch.

    Args:
        input_ids_BT: batch × tokens.
        attention_mask_BT: 0 where a row is padded, on either side; None: nowhere.
        image_grids: images × 3, row after row of the batch.
        video_grids: videos × 3, likewise.
        config: names the placeholder tokens and the spatial merge size.

    Returns:
        position_ids_3BT, int64, 1 at padding as in the reference; deltas_B1: the token at index i of the padded row has
        the position `i + delta`.

    Raises:
        PlaceholderMismatchError: the number of placeholder tokens does not match the images.
    """
    images, videos = _pictures(_grid_list(image_grids), _grid_list(video_grids), config)
    if attention_mask_BT is None:
        mask_BT = torch.ones_like(input_ids_BT, dtype=torch.bool)
    else:
        mask_BT = attention_mask_BT.to(device=input_ids_BT.device, dtype=torch.bool)
    _check_counts(input_ids_BT[mask_BT], images, videos)
    positions_3BT = torch.ones((3, *input_ids_BT.shape), dtype=torch.int64)
    deltas = []
    for row, (input_ids_T, mask_T) in enumerate(zip(input_ids_BT, mask_BT.cpu(), strict=True)):
        kept_3T = _row_positions(input_ids_T.cpu()[mask_T].tolist(), images, videos)
        positions_3BT[:, row, mask_T] = kept_3T
        deltas.append(_delta(kept_3T, input_ids_T.shape[0]))
    device = input_ids_BT.device
    return positions_3BT.to(device), torch.tensor(deltas, dtype=torch.int64, device=device)[:, None]


def _pictures(
    image_grids: Sequence[Grid], video_grids: Sequence[Grid], config: EchoVLMConfig
) -> tuple[_Pictures, _Pictures]:
    merge = config.vision_config.spatial_merge_size
    return (
        _Pictures("image", config.image_token_id, image_grids, merge),
        _Pictures("video", config.video_token_id, video_grids, merge),
    )


def _check_counts(input_ids: torch.Tensor, *pictures: _Pictures) -> None:
    for kind in pictures:
        kind.check_count(int((input_ids == kind.token_id).sum()))


def _grid_list(grids: torch.Tensor | None) -> list[Grid]:
    return [] if grids is None else [(int(t), int(h), int(w)) for t, h, w in grids.tolist()]


def _delta(positions_3T: torch.Tensor, length: int) -> int:
    return (int(positions_3T.max()) + 1 if positions_3T.numel() else 0) - length


def _row_positions(token_ids: list[int], images: _Pictures, videos: _Pictures) -> torch.Tensor:
    kinds = {images.token_id: images, videos.token_id: videos}
    parts: list[torch.Tensor] = []
    position = index = 0
    while index < len(token_ids):
        kind = kinds.get(token_ids[index])
        if kind is None:
            end = index + 1
            while end < len(token_ids) and token_ids[end] not in kinds:
                end += 1
            parts.append(torch.arange(position, position + end - index).expand(3, -1))
            position += end - index
        else:
            number, grid = kind.used, kind.take()
            end = index + kind.tokens(grid)
            run = token_ids[index:end].count(kind.token_id)
            if run != end - index:
                raise PlaceholderMismatchError(
                    f"{kind.kind} {number} fills {end - index} placeholder tokens, but the prompt has {run} where it "
                    f"stands (token {index}); give the {kind.kind}s in the order of the prompt"
                )
            block_3T = _grid_positions(grid, kind.merge) + position
            parts.append(block_3T)
            # The reference continues after the block's largest coordinate. transformers 5 ignores time here, which
            # differs for a video that is longer than it is wide.
            position = int(block_3T.max()) + 1
        index = end
    return torch.cat(parts, dim=1) if parts else torch.empty((3, 0), dtype=torch.int64)


def _grid_positions(grid: Grid, merge: int) -> torch.Tensor:
    axes = [torch.arange(grid[0]), torch.arange(grid[1] // merge), torch.arange(grid[2] // merge)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(start_dim=1)
