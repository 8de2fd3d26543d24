"""Animated GIF, PNG and WebP: their frames are taken like those of a cine loop."""

import io
import struct

from PIL import Image

from echovlm_ray.vision.opaque import opaque_rgb
from echovlm_ray.vision.picture import InvalidPictureError, Picture, check_pixels
from echovlm_ray.vision.sampling import sample_frames

# Frames build on each other, so all are decoded: their pixels together, in multiples of the limit of pixels.
MAX_DECODED = 16
_MAX_GIF_BLOCKS = 400_000
# Small frames cost some time each, too.
_MAX_FRAMES = 5000
_EXTENSION, _IMAGE, _TRAILER = b"!", b",", b";"


def decode_animation(
    content: bytes, kind: str, frames: int, *, max_pixels: int, max_frames: int, notices: tuple[str, ...] = ()
) -> Picture:
    """Frames of an animation, evenly spread; one frame is a still.

    Args:
        content: the whole file.
        kind: Pillow's name of the format.
        frames: how many there are, counted by the caller.
        max_pixels: of the frames taken together.
        max_frames: at least 2.
        notices: of the caller, taken over.

    Raises:
        InvalidPictureError: more pixels than the limits.
    """
    with Image.open(io.BytesIO(content), formats=(kind,)) as image:
        width, height = image.size
        indices = sample_frames(frames, max_frames)
        wanted = sorted(set(indices))
        check_pixels(width, height, len(wanted), max_pixels)
        if width * height * frames > MAX_DECODED * max_pixels or frames > _MAX_FRAMES:
            raise InvalidPictureError(
                f"is an animation of {frames} frames of {width} × {height} pixels, and at most {_MAX_FRAMES} frames or "
                f"{MAX_DECODED} × {max_pixels} pixels (gateway.max_image_pixels) are decoded: send fewer or smaller "
                "frames"
            )
        taken = {}
        for index in range(wanted[-1] + 1):
            image.seek(index)
            if index in wanted:
                taken[index] = opaque_rgb(image)[0]
    return Picture(tuple(taken[index] for index in indices), indices, frames, notices)


def count_gif_frames(content: bytes, max_pixels: int) -> tuple[int, tuple[str, ...]]:
    """The number of complete frames in a GIF (GIF 89a), with a notice if it is truncated.

    Raises:
        InvalidPictureError: none, or more blocks or pixels than are decoded.
    """
    offset = 13 + _colour_table(content[10:11])
    frames, pixels, blocks = 0, 0, 0
    while (kind := content[offset : offset + 1]) in (_EXTENSION, _IMAGE):
        if kind == _IMAGE:
            width, height = struct.unpack_from("<HH", content.ljust(offset + 9), offset + 5)
            pixels += width * height
            offset += 11 + _colour_table(content[offset + 9 : offset + 10])
        else:
            offset += 2
        while blocks <= _MAX_GIF_BLOCKS and offset < len(content) and (length := content[offset]):
            offset += 1 + length
            blocks += 1
        offset += 1
        if pixels > MAX_DECODED * max_pixels or blocks > _MAX_GIF_BLOCKS:
            raise InvalidPictureError(
                f"is a GIF of more than {_MAX_GIF_BLOCKS} blocks or {MAX_DECODED} × {max_pixels} pixels "
                "(gateway.max_image_pixels): send fewer or smaller frames"
            )
        frames += kind == _IMAGE and offset <= len(content)
    if not frames:
        raise InvalidPictureError("is a GIF that is damaged or truncated; export it again")
    if kind == _TRAILER:
        return frames, ()
    return frames, ("The file is cut off; the whole frames before that are taken.",)


def _colour_table(flags: bytes) -> int:
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0
