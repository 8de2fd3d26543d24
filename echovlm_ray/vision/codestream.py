"""The size that a compressed frame claims for itself, read from its header.

A DICOM header and the frames below it can disagree, and decoders allocate what the frame claims. So it is read first.
"""

from collections.abc import Iterator
from dataclasses import dataclass

_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD9)))
_ADOBE = 0xEE
_JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  "


@dataclass(frozen=True, slots=True)
class FrameSize:
    """Width and height in pixels, and how many values a pixel has."""

    width: int
    height: int
    samples: int


def frame_size(codestream: bytes) -> FrameSize | None:
    """The size of a JPEG, JPEG-LS or JPEG 2000 codestream (ISO 10918-1, 14495-1, 15444-1), or None."""
    if codestream.startswith(b"\xff\xd8"):
        return _jpeg_size(codestream)
    if codestream.startswith(_JP2_SIGNATURE):
        start = codestream.find(b"jp2c")
        return None if start < 0 else _jpeg2000_size(codestream[start + 4 : start + 64])
    return _jpeg2000_size(codestream[:64])


def says_adobe_ybr(codestream: bytes) -> bool:
    """Whether a JPEG says in Adobe's marker that its colours were transformed to YBR."""
    return any(
        marker == _ADOBE and segment.startswith(b"Adobe") and segment[11:12] == b"\x01"
        for marker, segment in _jpeg_segments(codestream)
    )


def _jpeg_size(codestream: bytes) -> FrameSize | None:
    for marker, segment in _jpeg_segments(codestream):
        if marker in _START_OF_FRAME and len(segment) >= 6:
            return FrameSize(
                int.from_bytes(segment[3:5], "big"), int.from_bytes(segment[1:3], "big"), samples=segment[5]
            )
    return None


def _jpeg_segments(codestream: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers and their contents, up to the first start of frame."""
    offset = 2
    while offset + 4 <= len(codestream) and codestream[offset] == 0xFF:
        marker = codestream[offset + 1]
        if marker == 0xFF:
            offset += 1
        elif marker in _WITHOUT_LENGTH:
            offset += 2
        else:
            end = offset + 2 + int.from_bytes(codestream[offset + 2 : offset + 4], "big")
            yield marker, codestream[offset + 4 : end]
            if marker in _START_OF_FRAME:
                return
            offset = end


def _jpeg2000_size(header: bytes) -> FrameSize | None:
    if not header.startswith(b"\xff\x4f\xff\x51") or len(header) < 42:
        return None
    right, bottom, left, top = (int.from_bytes(header[at : at + 4], "big") for at in (8, 12, 16, 20))
    return FrameSize(right - left, bottom - top, int.from_bytes(header[40:42], "big"))
