"""The header of a compressed frame: its size, bits and colours.

A DICOM header and the frames below it can disagree, and decoders allocate what the frame claims. So it is read first.
JPEG is ISO 10918-1, JPEG-LS 14495-1, JPEG 2000 15444-1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
_JPEG_LS_START = 0xF7
_PROGRESSIVE_START = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD9)))
_JFIF, _ADOBE = 0xE0, 0xEE
_JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  "
_JPEG2000_START = b"\xff\x4f\xff\x51"
END_MARKER = b"\xff\xd9"
# It is within this many bytes of the end, because fragments are padded to even lengths.
END_BYTES = 64


@dataclass(frozen=True, slots=True)
class FrameSize:
    """The contents of a codestream's header.

    Attributes:
        width: pixels.
        height: pixels.
        samples: how many values a pixel has.
        bits: of a value.
        signed: whether values are (only JPEG 2000 declares it).
        kind: how the frame is compressed.
        colours: of three samples, what decoding without a colour transform gives; None where nothing says so. Of
            JPEG 2000 with a component transform it is RGB, because every decoder reverses it.
        certain: whether `colours` follows from more than the presence of a JFIF marker, which some writers put in
            front of RGB.
        progressive: whether it is a progressive JPEG, whose scans all cover the whole picture.
    """

    width: int
    height: int
    samples: int
    bits: int = 8
    signed: bool = False
    kind: Literal["JPEG", "JPEG-LS", "JPEG 2000"] = "JPEG"
    colours: Literal["RGB", "YBR"] | None = None
    certain: bool = False
    progressive: bool = False


def frame_size(codestream: bytes) -> FrameSize | None:
    """The header of a JPEG, JPEG-LS or JPEG 2000 codestream, or None."""
    if codestream.startswith(b"\xff\xd8"):
        return _jpeg_header(codestream)
    codestream = without_jp2_boxes(codestream)
    return _jpeg2000_header(codestream) if codestream.startswith(_JPEG2000_START) else None


def starts_codestream(data: bytes) -> bool:
    """Whether a codestream starts here: JPEG, JPEG-LS, JPEG 2000 or its JP2 file."""
    return data.startswith((b"\xff\xd8\xff", _JPEG2000_START, _JP2_SIGNATURE))


def without_jp2_boxes(codestream: bytes) -> bytes:
    """The codestream within a JP2 file; anything else unchanged."""
    if not codestream.startswith(_JP2_SIGNATURE):
        return codestream
    start = codestream.find(b"jp2c" + _JPEG2000_START)
    return b"" if start < 0 else codestream[start + 4 :]


def progressive_scans(codestream: bytes) -> int:
    """How many scans a progressive JPEG has; each costs a decoder as much as a whole picture."""
    return codestream.count(b"\xff\xda")


def _jpeg_header(codestream: bytes) -> FrameSize | None:
    has_jfif, adobe_transform = False, None
    for marker, segment in _jpeg_segments(codestream):
        if marker == _JFIF and segment.startswith(b"JFIF"):
            has_jfif = True
        elif marker == _ADOBE and segment.startswith(b"Adobe") and len(segment) >= 12:
            adobe_transform = segment[11]
        elif marker in _START_OF_FRAME:
            if len(segment) < 6 or len(segment) < 6 + 3 * segment[5]:
                return None
            components = [segment[6 + 3 * index : 9 + 3 * index] for index in range(segment[5])]
            colours, certain = _jpeg_colours(components, has_jfif, adobe_transform)
            return FrameSize(
                width=int.from_bytes(segment[3:5], "big"),
                height=int.from_bytes(segment[1:3], "big"),
                samples=segment[5],
                bits=segment[0],
                kind="JPEG-LS" if marker == _JPEG_LS_START else "JPEG",
                colours=None if marker == _JPEG_LS_START else colours,
                certain=certain,
                progressive=marker in _PROGRESSIVE_START,
            )
    return None


def _jpeg_colours(
    components: list[bytes], has_jfif: bool, adobe_transform: int | None
) -> tuple[Literal["RGB", "YBR"] | None, bool]:
    if len(components) != 3:
        return None, False
    if adobe_transform is not None:
        return ("RGB" if adobe_transform == 0 else "YBR"), True
    if bytes(component[0] for component in components) == b"RGB":
        return "RGB", True
    if len({component[1] for component in components}) > 1:
        # Only chroma is stored at a lower resolution.
        return "YBR", True
    return ("YBR" if has_jfif else None), False


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


def _jpeg2000_header(codestream: bytes) -> FrameSize | None:
    if len(codestream) < 45:
        return None
    right, bottom, left, top = (int.from_bytes(codestream[at : at + 4], "big") for at in (8, 12, 16, 20))
    samples = int.from_bytes(codestream[40:42], "big")
    precision = codestream[42]
    # Of each component three bytes: precision and its spacing across and down.
    spacings = {codestream[42 + 3 * index + 1 : 42 + 3 * index + 3] for index in range(samples)}
    if right <= left or bottom <= top or spacings != {b"\x01\x01"}:
        return None
    coding_style = codestream.find(b"\xff\x52", 42, 4096)
    transformed = coding_style >= 0 and codestream[coding_style + 8 : coding_style + 9] == b"\x01"
    return FrameSize(
        width=right - left,
        height=bottom - top,
        samples=samples,
        bits=(precision & 0x7F) + 1,
        signed=bool(precision & 0x80),
        kind="JPEG 2000",
        colours="RGB" if samples == 3 and transformed else None,
        certain=transformed,
    )


def is_ended(codestream: bytes) -> bool:
    """Whether the codestream has its end marker, perhaps with some bytes of padding behind it."""
    return END_MARKER in codestream[-END_BYTES:]
