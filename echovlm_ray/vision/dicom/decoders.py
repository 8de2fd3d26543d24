"""One compressed frame to its values: JPEG, JPEG-LS, JPEG 2000 (HTJ2K too) and RLE.

imagecodecs decodes: libjpeg-turbo (JPEG of 8 and 12 bits, without loss up to 16), CharLS and OpenJPEG. Their texts stay
here.
"""

from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt

from echovlm_ray.vision.codestream import END_MARKER, FrameSize, is_ended, progressive_scans, without_jp2_boxes
from echovlm_ray.vision.dicom.errors import FrameError

# Encoders write about ten; every scan costs as much as a picture.
MAX_PROGRESSIVE_SCANS = 100
# Bits that no encoder ends with: what a decoder makes of them differs from what it makes of missing data.
_FILLER = b"\x5a\xc3\x96\x3c" * 64
# An RLE segment may have some bytes behind its pixels to become even.
_RLE_SLACK = 160


def decode_codestream(codestream: bytes, size: FrameSize, *, reverse_ybr: bool = False) -> npt.NDArray[Any]:
    """The values of a JPEG, JPEG-LS or JPEG 2000 frame, rows × columns (× samples).

    JPEG 2000's component transform is reversed, because it is part of the codestream.

    Args:
        codestream: the whole frame.
        size: its header.
        reverse_ybr: of a JPEG of three samples, returns RGB for YBR; without, what is stored.

    Raises:
        FrameError: it cannot be decoded, or ends before its last rows.
    """
    try:
        if size.kind == "JPEG":
            values = _jpeg(codestream, size, reverse_ybr)
        elif size.kind == "JPEG-LS":
            values = imagecodecs.jpegls_decode(_ended(codestream))
        else:
            values = imagecodecs.jpeg2k_decode(_ended(without_jp2_boxes(codestream)), numthreads=1)
    except FrameError:
        raise
    except Exception:
        # Any exception: what a decoder raises on hostile bytes is not to be foreseen.
        raise FrameError from None
    shape = (size.height, size.width) if size.samples == 1 else (size.height, size.width, size.samples)
    if values.shape != shape:
        raise FrameError
    return values


def _ended(codestream: bytes) -> bytes:
    if is_ended(codestream):
        return codestream
    return codestream[:-1] + END_MARKER if codestream.endswith(b"\xff") else codestream + END_MARKER


def _jpeg(codestream: bytes, size: FrameSize, reverse_ybr: bool) -> npt.NDArray[Any]:
    if size.progressive and progressive_scans(codestream) > MAX_PROGRESSIVE_SCANS:
        raise FrameError(f"has a JPEG frame of more than {MAX_PROGRESSIVE_SCANS} progressive scans; save it with fewer")
    ended = _ended(codestream)
    values = _libjpeg(ended, size, reverse_ybr)
    # libjpeg invents what is missing. Where more data would have changed the picture, some are.
    if ended is not codestream:
        more = ended[: -len(END_MARKER)] + _FILLER + END_MARKER
        if not np.array_equal(values, _libjpeg(more, size, reverse_ybr)):
            raise FrameError
    return values


def _libjpeg(codestream: bytes, size: FrameSize, reverse_ybr: bool) -> npt.NDArray[Any]:
    if size.samples != 3:
        return imagecodecs.jpeg8_decode(codestream)
    space = "YCBCR" if reverse_ybr else "RGB"
    return imagecodecs.jpeg8_decode(codestream, colorspace=space, outcolorspace="RGB")


def rle_segments(frame: bytes) -> int:
    """How many segments an RLE frame has: bytes of a value, times values of a pixel."""
    return int.from_bytes(frame[:4], "little")


def decode_rle(frame: bytes, rows: int, columns: int, samples: int, value_bytes: int) -> npt.NDArray[Any]:
    """The values of an RLE frame (PS3.5 annex G), rows × columns (× samples), unsigned.

    Raises:
        FrameError: it cannot be decoded, or has less than a frame.
    """
    count = rle_segments(frame)
    if count != samples * value_bytes:
        raise FrameError
    starts = [int.from_bytes(frame[at : at + 4], "little") for at in range(4, 4 + 4 * count, 4)]
    pixels = rows * columns
    values = np.zeros((samples, pixels, value_bytes), np.uint8)
    segment = bytearray(pixels + _RLE_SLACK)
    for index, (start, end) in enumerate(zip(starts, [*starts[1:], len(frame)], strict=True)):
        try:
            decoded = imagecodecs.packbits_decode(frame[start:end], out=segment)
        except Exception:
            raise FrameError from None
        if len(decoded) < pixels:
            raise FrameError
        sample, place = divmod(index, value_bytes)
        # The first segment has a value's most significant bytes.
        values[sample, :, value_bytes - 1 - place] = np.frombuffer(decoded, np.uint8, pixels)
    planes = values.reshape(samples, -1).view(f"<u{value_bytes}").reshape(samples, rows, columns)
    return planes[0] if samples == 1 else np.moveaxis(planes, 0, -1)
