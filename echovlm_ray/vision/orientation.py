"""The orientation in EXIF or XMP, read from the bytes of this field only.

Libraries parse all of EXIF and fail on broken fields that do not matter here.
"""

import re
import struct

import numpy as np

from echovlm_ray.vision.picture import FrameArray

_TAG = 0x0112
_EXIF = b"Exif\x00\x00"
_MAX_ENTRIES = 1000
_TYPES = {1: "B", 3: "H", 4: "I"}
_XMP_FIELD = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])")


class BrokenExifError(ValueError):
    """EXIF in which no list of fields can be found."""


def read_orientation(exif: bytes, xmp: bytes = b"") -> tuple[int, tuple[str, ...]]:
    """The orientation, 1 to 8, that a file notes, 1 if none, and a notice if that cannot be known.

    Args:
        exif: a TIFF structure, with or without "Exif" in front; empty if there is none.
        xmp: XMP, which counts where EXIF has no orientation.
    """
    notices: tuple[str, ...] = ()
    orientation = None
    if exif:
        try:
            orientation = _exif_orientation(exif)
        except BrokenExifError:
            notices = ("Its EXIF is broken, so the picture is shown as it is stored, not turned.",)
    if orientation is None and (found := _XMP_FIELD.search(xmp)):
        return int(found[1]), ()
    return orientation or 1, notices


def _exif_orientation(exif: bytes) -> int | None:
    """The orientation of a block of EXIF (EXIF 2.32, 4.6.4 A); None if it has none."""
    tiff = exif.removeprefix(_EXIF)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            raise BrokenExifError
        (offset,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, offset)
        for entry in range(min(entries, _MAX_ENTRIES)):
            place = offset + 2 + 12 * entry
            tag, kind = struct.unpack_from(f"{order}HH", tiff, place)
            if tag == _TAG and kind in _TYPES:
                (value,) = struct.unpack_from(order + _TYPES[kind], tiff, place + 8)
                return int(value) if 1 <= value <= 8 else None
    except struct.error:
        raise BrokenExifError from None
    return None


def oriented(frame: FrameArray, orientation: int) -> FrameArray:
    """The frame mirrored and rotated according to the orientation."""
    if orientation >= 5:
        frame = frame.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        frame = frame[::-1]
    if orientation in (2, 3, 6, 7):
        frame = frame[:, ::-1]
    return np.ascontiguousarray(frame)
