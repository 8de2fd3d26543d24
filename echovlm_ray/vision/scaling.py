"""Scales frames for the model: Qwen2-VL's `smart_resize`, with Pillow only.

The processor and the decoder processes scale with it, so that a frame is made small where it was decoded. The result is
the same to the bit as that of transformers' PIL image processor.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

# Qwen2-VL's own limit of how much longer one side may be than the other.
MAX_SIDES_RATIO = 200
# Of Qwen2-VL's own preprocessor_config.json: pixels of a token's side, bounds of a frame, and Pillow's bicubic filter.
_SIDE, _MIN_PIXELS, _MAX_PIXELS, _BICUBIC = 28, 56 * 56, 1280 * 28 * 28, 3


@dataclass(frozen=True, slots=True)
class Scaling:
    """To which size frames are scaled.

    Attributes:
        side: of a visual token in pixels; both sides of a scaled frame are multiples of it.
        min_pixels: smaller frames are scaled up.
        max_pixels: larger frames are scaled down.
        max_visual_tokens: a frame that takes more even when it is scaled is refused; None refuses none.
        resample: Pillow's number of the filter.
    """

    side: int
    min_pixels: int
    max_pixels: int
    max_visual_tokens: int | None
    resample: int

    @property
    def max_frame_pixels(self) -> int:
        """The most pixels of a scaled frame. Needs `max_visual_tokens`."""
        assert self.max_visual_tokens is not None
        return self.max_visual_tokens * self.side**2

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a scaled frame.

        Raises:
            ValueError: the frame is so long and narrow that it cannot be scaled to fit.
        """
        if max(height, width) > MAX_SIDES_RATIO * min(height, width):
            raise ValueError(f"{width} × {height} pixels: one side is over {MAX_SIDES_RATIO} times the other; crop it")
        limit, side = self.max_visual_tokens, self.side
        # A limit below the checkpoint's minimum wins.
        low = min(self.min_pixels, self.max_pixels)
        size = self._resized(height, width, low)
        if limit is None:
            return size
        # Scaling up rounds both sides up, which can pass the limit by a row of tokens. What is longer than a row of all
        # tokens cannot be helped.
        fits_in_a_row = max(height, width) <= limit * min(height, width)
        while fits_in_a_row and math.prod(size) > limit * side**2 and low >= side**2:
            low = low * 19 // 20
            size = self._resized(height, width, low)
        if math.prod(size) > limit * side**2:
            tokens = math.prod(size) // side**2
            raise ValueError(f"so long and narrow that it takes {tokens} visual tokens, over {limit}; crop it")
        return size

    def _resized(self, height: int, width: int, min_pixels: int) -> tuple[int, int]:
        """transformers' `smart_resize`."""
        side = self.side
        rows, columns = round(height / side), round(width / side)
        if rows * columns * side**2 > self.max_pixels:
            factor = math.sqrt(height * width / self.max_pixels)
            rows = max(1, math.floor(height / factor / side))
            columns = max(1, math.floor(width / factor / side))
        elif rows * columns * side**2 < min_pixels:
            factor = math.sqrt(min_pixels / (height * width))
            rows, columns = math.ceil(height * factor / side), math.ceil(width * factor / side)
        return rows * side, columns * side

    def apply(self, frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The frame, height × width × 3 of RGB, at its scaled size.

        Raises:
            ValueError: see `size`.
        """
        height, width = self.size(*frame.shape[:2])
        return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling(self.resample)))


def usual_scaling(max_visual_tokens: int) -> Scaling:
    """How a checkpoint with Qwen2-VL's own image processor scales; for where none is at hand."""
    max_pixels = min(_MAX_PIXELS, max_visual_tokens * _SIDE**2)
    return Scaling(_SIDE, _MIN_PIXELS, max_pixels, max_visual_tokens, _BICUBIC)
