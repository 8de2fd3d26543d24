"""JPEG 2000 files (ISO 15444-1): the codestream's header, checked before a decoder allocates memory.

A few bytes can announce millions of tiles, layers or precincts, each of which costs a decoder memory and time.
"""

import struct
from dataclasses import dataclass, replace

from echovlm_ray.vision.picture import InvalidPictureError

_CODESTREAM = b"\xff\x4f\xff\x51"
_CODING_STYLE, _TILE_PART, _END = 0xFF52, 0xFF90, b"\xff\xd9"
_MAX_BOXES = 1000
_MAX_SEGMENTS = 1000
_MAX_TILE_PARTS = 100_000
# Packets are the smallest parts of a codestream: one for each tile, component, resolution, precinct and layer.
MAX_PACKETS = 500_000


@dataclass(frozen=True, slots=True)
class Jpeg2000File:
    """Size of the picture in pixels, how many values a pixel has, of how many bits each at most.

    `has_end` is False if only the end marker is missing.
    """

    width: int
    height: int
    samples: int
    bits: int
    has_end: bool = True


def read_jpeg2000(content: bytes) -> Jpeg2000File:
    """Reads the headers and finds every part of every tile.

    Raises:
        InvalidPictureError: truncated, damaged, or announcing more packets than an ordinary file has.
    """
    try:
        codestream = _codestream(content)
        segments, tiles_at = _main_header(codestream)
        picture, tiles, tile_size = _size(codestream)
        coding = segments[_CODING_STYLE]
        _check_packets(coding, picture, tiles, tile_size)
        end = _tiles_end(codestream, tiles_at, tiles)
    except (KeyError, IndexError, struct.error, ZeroDivisionError):
        end = None
    if end is None:
        raise InvalidPictureError("is a JPEG 2000 file that is damaged or truncated; export it again")
    return replace(picture, has_end=end + 1 < len(codestream))


def _codestream(content: bytes) -> memoryview:
    """The contents of the codestream's box, or everything if there are no boxes."""
    view = memoryview(content)
    if content.startswith(_CODESTREAM):
        return view
    offset = 0
    for _ in range(_MAX_BOXES):
        length, kind = struct.unpack_from(">I4s", view, offset)
        header = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", view, offset + 8)
            header = 16
        if kind == b"jp2c":
            return view[offset + header :]
        if length < header:
            break
        offset += length
    raise KeyError("jp2c")


def _main_header(codestream: memoryview) -> tuple[dict[int, bytes], int]:
    """The first segment of each marker, and where the tiles begin."""
    segments: dict[int, bytes] = {}
    offset = 2
    for _ in range(_MAX_SEGMENTS):
        marker, length = struct.unpack_from(">HH", codestream, offset)
        if marker == _TILE_PART:
            return segments, offset
        segments.setdefault(marker, bytes(codestream[offset + 4 : offset + 2 + length]))
        offset += 2 + length
    raise KeyError("SOT")


def _size(codestream: memoryview) -> tuple[Jpeg2000File, int, tuple[int, int]]:
    """The picture, the number of its tiles, and the size of a tile (A.5.1)."""
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, samples = struct.unpack_from(
        ">8IH", codestream, 8
    )
    precisions = [codestream[42 + 3 * index] for index in range(samples)]
    across, down = -(-(right - tile_left) // tile_width), -(-(bottom - tile_top) // tile_height)
    picture = Jpeg2000File(right - left, bottom - top, samples, max((value & 0x7F) + 1 for value in precisions))
    return picture, across * down, (min(tile_width, right - left), min(tile_height, bottom - top))


def _check_packets(coding: bytes, picture: Jpeg2000File, tiles: int, tile_size: tuple[int, int]) -> None:
    """Bounds what the coding style announces (A.6.1): precincts of each resolution, times layers, components, tiles."""
    style, layers, levels = coding[0], int.from_bytes(coding[2:4], "big"), coding[5]
    precincts = 0
    for level in range(levels + 1):
        exponents = coding[10 + level] if style & 1 else 0xFF
        width, height = (-(-side >> (levels - level)) or 1 for side in tile_size)
        precincts += max(1, -(-width >> (exponents & 15))) * max(1, -(-height >> (exponents >> 4)))
    if tiles * picture.samples * layers * precincts > MAX_PACKETS:
        raise InvalidPictureError(
            f"is a JPEG 2000 file of more than {MAX_PACKETS} packets (tiles × components × resolutions × precincts × "
            "layers); save it with fewer tiles and layers, or as PNG"
        )


def _tiles_end(codestream: memoryview, offset: int, tiles: int) -> int | None:
    """Where the tiles end; None unless each has a part, and no part reaches beyond the end of the file (A.4.2)."""
    seen: set[int] = set()
    for _ in range(_MAX_TILE_PARTS):
        if offset + 12 > len(codestream) or codestream[offset : offset + 2].tobytes() != b"\xff\x90":
            break
        tile, length = struct.unpack_from(">HI", codestream, offset + 4)
        seen.add(tile)
        if length == 0:
            is_whole = len(seen) == tiles and bytes(codestream[-4:]).rstrip(b"\x00").endswith(_END)
            return len(codestream) - len(_END) if is_whole else None
        if length < 14 or offset + length > len(codestream):
            return None
        offset += length
    return offset if len(seen) == tiles else None
