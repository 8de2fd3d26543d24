"""The result of decoding a still image or a video, and the error of a file that is refused."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Bytes of a pixel as a decoder returns it, if there are as many pixels as the limit allows: RGB of 16 bits.
STORED_BYTES = 6

FrameArray = npt.NDArray[np.uint8]


class InvalidPictureError(ValueError):
    """A file that cannot be shown. The text begins with a verb, its subject being the file."""


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """The frames of a file that are looked at.

    Attributes:
        frames: height × width × 3, uint8, RGB, all of one size.
        indices: where in the file they are; the last one may occur twice (see `sample_frames`).
        source_frames: how many frames the file has.
        notices: deviations from the file's attributes, one sentence each.
        is_partial: whether the file is cut off or damaged, so that frames or parts of them are missing.
    """

    frames: tuple[FrameArray, ...]
    indices: tuple[int, ...] = (0,)
    source_frames: int = 1
    notices: tuple[str, ...] = ()
    is_partial: bool = False


def check_pixels(width: int, height: int, frames: int, max_pixels: int, pixel_bytes: int = 3) -> None:
    """Refuses frames of more pixels or bytes than the limit, all of them together.

    Args:
        width: of a frame.
        height: likewise.
        frames: the number that is decoded together.
        max_pixels: the limit; `STORED_BYTES` times as many bytes may be decoded together.
        pixel_bytes: what a decoder returns for a pixel.

    Raises:
        InvalidPictureError: they have more, or none at all.
    """
    if width < 1 or height < 1:
        raise InvalidPictureError("says that it has no pixels; export it again")
    pixels = width * height * frames
    if pixels <= max_pixels and pixels * pixel_bytes <= STORED_BYTES * max_pixels:
        return
    size = f"{width} × {height} pixels" + (f" in {frames} frames to look at" if frames > 1 else "")
    if pixels > max_pixels:
        limit = f"{max_pixels} pixels"
    else:
        size, limit = f"{size} of {pixel_bytes} bytes", f"{STORED_BYTES * max_pixels} bytes, {STORED_BYTES} a pixel"
    raise InvalidPictureError(
        f"has {size} and the limit is {limit} (gateway.max_image_pixels): scale it down before sending"
    )
