"""PNG files (W3C, third edition): their chunks, read before a decoder is given anything.

Decoders inflate texts and colour profiles and fail on a wrong one, though they do not concern the picture. So only the
chunks that do are passed on; the others are never inflated.
"""

import struct
import zlib
from dataclasses import dataclass, field

from echovlm_ray.vision.picture import InvalidPictureError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_CONCERN_PIXELS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"))
_COLOUR_ONLY = frozenset((b"PLTE", b"tRNS"))
# The keyword of XMP, and that it is not compressed.
_XMP = b"XML:com.adobe.xmp\x00\x00"
# Encoders write 8 KiB or more a chunk.
_MAX_CHUNKS = 100_000
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# First column, first row, steps to the right and down of the passes of an interlaced picture.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_INFLATE_STEP = 1 << 20


@dataclass(slots=True)
class PngFile:
    """The contents of a PNG's chunks.

    Attributes:
        width: pixels.
        height: likewise.
        bits: of a value.
        colour: the colour type: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA.
        significant: the number of significant bits, if the file has it.
        exif: the contents of the eXIf chunk.
        xmp: the XMP, unless it is compressed.
        animation_frames: the number of complete frames of an animation; 0 for a still.
        body: the file with only the chunks that concern the pixels.
        wrong: the kinds of those chunks whose checksum is wrong, and IEND if it is missing.
    """

    width: int = 0
    height: int = 0
    bits: int = 8
    colour: int = 0
    interlaced: bool = False
    significant: int | None = None
    exif: bytes = b""
    xmp: bytes = field(default=b"", repr=False)
    animation_frames: int = 0
    body: bytes = field(default=b"", repr=False)
    wrong: set[bytes] = field(default_factory=set)
    chunks: list[bytes] = field(default_factory=list, repr=False)

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a pixel once it is decoded."""
        return max(3, _SAMPLES[self.colour] * (1 + (self.bits > 8)))


def read_png(content: bytes) -> PngFile:
    """Reads all chunks; inflates nothing.

    Raises:
        InvalidPictureError: there is no header.
    """
    png = PngFile()
    kept, dropped, ended, animated = png.chunks, False, False, False
    offset = len(SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        if ended or offset + 8 > len(content):
            break
        length, kind = struct.unpack_from(">I4s", content, offset)
        end = offset + 12 + length
        data = memoryview(content)[offset + 8 : offset + 8 + length]
        if kind in _CONCERN_PIXELS:
            cut = end > len(content)
            if cut or zlib.crc32(data, zlib.crc32(kind)) != int.from_bytes(content[end - 4 : end], "big"):
                png.wrong.add(kind)
                kept.append(_chunk(kind, bytes(data)))
                dropped = True
            else:
                kept.append(content[offset:end])
            animated = animated or kind == b"acTL"
            png.animation_frames += kind == b"fcTL"
            ended = kind == b"IEND"
        else:
            dropped = True
            if kind == b"sBIT" and data:
                png.significant = max(data[:3])
            elif kind == b"eXIf":
                png.exif = bytes(data)
            elif kind == b"iTXt" and data[: len(_XMP)] == _XMP:
                png.xmp = bytes(data)
        if kind == b"IHDR":
            _read_header(png, bytes(data))
        offset = end
    if not ended:
        kept.append(_END)
        png.wrong.add(b"IEND")
    if not png.width:
        raise _damaged()
    png.animation_frames *= animated
    png.body = b"".join((SIGNATURE, *kept)) if dropped or not ended else content
    return png


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _damaged() -> InvalidPictureError:
    return InvalidPictureError("is a PNG file that is damaged or truncated; export it again")


def _read_header(png: PngFile, data: bytes) -> None:
    if len(data) != 13 or data[9] not in _SAMPLES:
        raise _damaged()
    png.width, png.height, png.bits, png.colour = struct.unpack_from(">IIBB", data)
    png.interlaced = bool(data[12])


def check_pixels_sound(png: PngFile) -> tuple[str, ...]:
    """Whether a file in which something is wrong still holds all of its pixels; inflates them if it must know.

    Returns:
        Notices of what is wrong and does not matter.

    Raises:
        InvalidPictureError: the pixels are truncated or damaged.
    """
    wrong = png.wrong
    if not wrong:
        return ()
    if wrong - _COLOUR_ONLY and (png.animation_frames or not _inflates_whole(png)):
        raise _damaged()
    notices = []
    if b"IEND" in wrong:
        notices.append("The end of the file is missing; its pixels are complete.")
    if wrong & _COLOUR_ONLY:
        notices.append("The checksum of its palette or transparency is wrong, so its colours may be.")
    if wrong & {b"IHDR", b"IDAT"} and b"IEND" not in wrong:
        notices.append("A checksum in the file is wrong; the one over all of its pixels is right.")
    return tuple(notices)


def _inflates_whole(png: PngFile) -> bool:
    """Whether the pixel data inflate to the right length and have the right checksum of their own (RFC 1950)."""
    expected = _raw_bytes(png)
    inflater = zlib.decompressobj()
    total = 0
    try:
        for chunk in png.chunks:
            data = chunk[8:-4] if chunk[4:8] == b"IDAT" else b""
            while data and not inflater.eof and total <= expected:
                total += len(inflater.decompress(data, _INFLATE_STEP))
                data = inflater.unconsumed_tail
    except zlib.error:
        return False
    return inflater.eof and total == expected


def _raw_bytes(png: PngFile) -> int:
    pixel_bits = png.bits * _SAMPLES[png.colour]
    total = 0
    for left, top, right, down in _PASSES if png.interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(png.width - left) // right), -(-(png.height - top) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + -(-columns * pixel_bits // 8))
    return total
