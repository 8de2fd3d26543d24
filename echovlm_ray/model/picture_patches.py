"""Images and videos cut into the patches that the vision encoder takes: Qwen2-VL's arithmetic with Pillow and numpy.

The patches of a still image are bit for bit those of transformers' PIL image processor; a video's are put together from
those of its frames, which is the same arithmetic. Neither transformers nor torch is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from echovlm_ray.model.picture_settings import PictureSettings
from echovlm_ray.model.picture_size import PictureSize
from echovlm_ray.vision.scaling import Scaling

Picture = Image.Image | npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class VisionPatches:
    """One image or video as the vision encoder takes it.

    Attributes:
        is_video: which of the two.
        grid: patches in time, height and width, before merging.
        patches: float32, (grid_t · grid_h · grid_w) × (channels · temporal_patch_size · patch_size²).
        num_tokens: how many places it takes in the prompt.
    """

    is_video: bool
    grid: tuple[int, int, int]
    patches: npt.NDArray[np.float32]
    num_tokens: int


class PicturePatches:
    """Cuts pictures as a checkpoint's preprocessor_config.json says."""

    def __init__(self, settings: PictureSettings) -> None:
        """Takes what that file says.

        Raises:
            ValueError: sizes are missing or contradict each other.
        """
        self.settings = settings
        self.size = PictureSize.of(settings)
        self._normalized = _normalized_bytes(settings)

    def scaling(self, max_visual_tokens: int | None = None) -> Scaling:
        """How frames are scaled; see `image_patches` for the limit."""
        side, max_pixels = self.size.side, self.size.max_pixels
        if max_visual_tokens is not None:
            max_pixels = min(max_pixels, max_visual_tokens * side * side)
        resample = int(self.settings.resample)
        return Scaling(side, self.size.min_pixels, max_pixels, max_visual_tokens, resample)

    def image_patches(self, image: Picture, *, max_visual_tokens: int | None = None) -> VisionPatches:
        """Cuts a still image into patches.

        Args:
            image: RGB; an array is height × width × 3, uint8.
            max_visual_tokens: the image is scaled to fit, also below the checkpoint's own minimum; None leaves it to
                the checkpoint.

        Raises:
            ValueError: the image is so long and narrow that it cannot be scaled to fit.
        """
        return self.scaled_patches([self.scaling(max_visual_tokens).apply(_pixels(image))], is_video=False)

    def video_patches(self, frames: Sequence[Picture], *, max_visual_tokens: int | None = None) -> VisionPatches:
        """Cuts a video into patches, `temporal_patch_size` (2) frames deep; a missing last frame is the one before it.

        Args:
            frames: RGB, all of one size.
            max_visual_tokens: for each `temporal_patch_size` frames, which thus take as much as one still image.

        Raises:
            ValueError: no frames, frames of different sizes, or frames too long and narrow.
        """
        scaling = self.scaling(max_visual_tokens)
        return self.scaled_patches([scaling.apply(_pixels(frame)) for frame in frames], is_video=True)

    def scaled_patches(self, frames: Sequence[npt.NDArray[np.uint8]], *, is_video: bool) -> VisionPatches:
        """Cuts frames that are scaled already (see `scaling`) into patches.

        Args:
            frames: height × width × 3, uint8, RGB, all of one size; a still image is one frame.
            is_video: see `video_patches`.

        Raises:
            ValueError: no frames, or frames of different sizes.
        """
        if not frames:
            raise ValueError("a video needs at least one frame")
        if len({frame.shape for frame in frames}) > 1:
            raise ValueError("the frames of a video must be of one size")
        side, depth = self.settings.patch_size, self.settings.temporal_patch_size
        height, width = frames[0].shape[0] // side, frames[0].shape[1] // side
        num_tokens = height * width // self.settings.merge_size**2
        # A still image's patch holds its frame `depth` times over.
        padded = [*frames, *[frames[-1]] * (-len(frames) % depth)]
        groups = [self._group_patches(padded[start : start + depth]) for start in range(0, len(padded), depth)]
        grid = (len(groups), height, width)
        return VisionPatches(is_video, grid, np.concatenate(groups), len(groups) * num_tokens)

    def _group_patches(self, frames: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Patches of `temporal_patch_size` frames: (grid_h · grid_w) × (channels · frames · patch_size²)."""
        side, merge = self.settings.patch_size, self.settings.merge_size
        rows, columns = (length // (side * merge) for length in frames[0].shape[:2])
        patches = np.empty((rows * columns * merge**2, 3, len(frames), side**2), dtype=np.float32)
        for slot, frame in enumerate(frames):
            if slot and frame is frames[slot - 1]:
                patches[:, :, slot] = patches[:, :, slot - 1]
                continue
            tiles = frame.reshape(rows, merge, side, columns, merge, side, 3).transpose(0, 3, 1, 4, 6, 2, 5)
            values = tiles.reshape(-1, 3, side**2)
            for channel, table in enumerate(self._normalized):
                patches[:, channel, slot] = table[values[:, channel]]
        return patches.reshape(len(patches), -1)


def _normalized_bytes(settings: PictureSettings) -> npt.NDArray[np.float32]:
    """What each byte of each channel becomes, channels × 256, in the dtypes in which transformers computes it."""
    shades = (np.arange(256, dtype=np.float64) * settings.rescale_factor).astype(np.float32)
    mean, deviation = (np.array(values, dtype=np.float32) for values in (settings.image_mean, settings.image_std))
    table: npt.NDArray[np.float32] = (shades - mean[:, None]) / deviation[:, None]
    return table


def _pixels(frame: Picture) -> npt.NDArray[np.uint8]:
    return np.asarray(frame.convert("RGB") if isinstance(frame, Image.Image) else frame)
