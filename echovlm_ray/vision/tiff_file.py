"""TIFF and BigTIFF files (TIFF 6.0 and its supplements): their directories, read before a decoder is given anything."""

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from echovlm_ray.vision.picture import InvalidPictureError

# Compressions that libtiff decodes here: none, fax, LZW, JPEG old and new, deflate, PackBits, LZMA, Zstandard, WebP.
_COMPRESSIONS = frozenset((1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34925, 50000, 50001))
_JPEG = frozenset((6, 7))
_TYPES = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}
_MAX_PAGES = 10_000
_MAX_ENTRIES = 4096
# Strips or tiles of a page.
_MAX_PARTS = 500_000
_MAX_JPEG_SCANS = 100

(
    _SUBFILE, _OLD_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _STRIPS, _ORIENTATION, _SAMPLES,
    _STRIP_BYTES, _PLANAR, _COLOURS, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _EXTRA, _FORMAT,
) = (254, 255, 256, 257, 258, 259, 262, 273, 274, 277, 279, 284, 320, 322, 323, 324, 325, 338, 339)  # fmt: skip

_Values = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True, slots=True, eq=False)
class TiffPage:
    """One directory of a TIFF: its number in the file and its picture's fields.

    Attributes:
        bits: of a value; the largest where they differ.
        photometric: 0 white is zero, 1 black is zero, 2 RGB, 3 palette, 5 CMYK, 6 YCbCr, 8 CIELab.
        planar: whether each sample is a separate plane.
        extra: what samples beyond the colours are: 1 alpha already multiplied, 2 alpha, 0 anything.
        colours: of a palette: all the reds, all the greens and all the blues, 16 bits each.
        reduced: whether it is a smaller copy of another page, or a mask.
    """

    number: int
    width: int
    height: int
    bits: int
    samples: int
    photometric: int
    compression: int
    orientation: int
    planar: bool
    extra: tuple[int, ...]
    colours: _Values | None
    reduced: bool
    parts: int
    part_pixels: int

    @property
    def shape(self) -> tuple[int, ...]:
        """What pages of one cine have in common."""
        return self.width, self.height, self.bits, self.samples, self.photometric, self.orientation


def read_tiff(content: bytes) -> list[TiffPage]:
    """All the pages of a file.

    Raises:
        InvalidPictureError: there are none, or the pixels of one reach beyond the end of the file.
    """
    try:
        return _read(content)
    except (KeyError, IndexError, struct.error, ValueError, OverflowError) as error:
        if isinstance(error, InvalidPictureError):
            raise
        raise damaged() from None


def damaged() -> InvalidPictureError:
    """The refusal of a file that cannot be read."""
    return InvalidPictureError("is a TIFF file that is damaged or truncated; export it again")


def _read(content: bytes) -> list[TiffPage]:
    order = "<" if content.startswith(b"II") else ">"
    big = content[2:4] in (b"+\x00", b"\x00+")
    (offset,) = struct.unpack_from(order + ("Q" if big else "I"), content, 8 if big else 4)
    pages: list[TiffPage] = []
    seen: set[int] = set()
    while offset and offset not in seen:
        if len(pages) == _MAX_PAGES:
            raise InvalidPictureError(
                f"is a TIFF file of more than {_MAX_PAGES} pages, the limit; send it in several files"
            )
        seen.add(offset)
        tags, offset = _directory(content, order, big, offset)
        pages.append(_page(content, len(pages), tags))
    if not pages:
        raise damaged()
    return pages


def _directory(content: bytes, order: str, big: bool, offset: int) -> tuple[dict[int, _Values], int]:
    """The tags of whole numbers of one directory, and where the next is."""
    count_format, entry_format, head = ("Q", "HHQ", 12) if big else ("H", "HHI", 8)
    (entries,) = struct.unpack_from(order + count_format, content, offset)
    offset += struct.calcsize(order + count_format)
    room = 8 if big else 4
    if entries > _MAX_ENTRIES:
        raise damaged()
    tags: dict[int, _Values] = {}
    for _ in range(entries):
        tag, kind, count = struct.unpack_from(order + entry_format, content, offset)
        if kind in _TYPES:
            dtype = np.dtype(order + _TYPES[kind])
            place = offset + head
            if count * dtype.itemsize > room:
                (place,) = struct.unpack_from(order + ("Q" if big else "I"), content, place)
            if place + count * dtype.itemsize <= len(content):
                tags[tag] = np.frombuffer(content, dtype, count, place)
        offset += head + room
    following = content[offset : offset + room]
    return tags, int.from_bytes(following, "little" if order == "<" else "big") if len(following) == room else 0


def _page(content: bytes, number: int, tags: dict[int, _Values]) -> TiffPage:
    def first(tag: int, default: int) -> int:
        values = tags.get(tag)
        return default if values is None or not len(values) else int(values[0])

    tiled = _TILES in tags
    offsets, sizes = (tags[_TILES], tags[_TILE_BYTES]) if tiled else (tags[_STRIPS], tags[_STRIP_BYTES])
    reduced = bool(first(_SUBFILE, 0) & 0b101) or first(_OLD_SUBFILE, 1) == 2
    parts = min(len(offsets), len(sizes))
    ends = offsets[:parts].astype(np.float64) + sizes[:parts].astype(np.float64)
    if not parts or (not reduced and float(ends.max()) > len(content)):
        raise damaged()
    width, height = int(tags[_WIDTH][0]), int(tags[_HEIGHT][0])
    return TiffPage(
        number=number,
        width=width,
        height=height,
        bits=int(tags[_BITS].max()) if _BITS in tags else 1,
        samples=first(_SAMPLES, 1),
        photometric=first(_PHOTOMETRIC, 1),
        compression=first(_COMPRESSION, 1),
        orientation=first(_ORIENTATION, 1),
        planar=first(_PLANAR, 1) == 2,
        extra=tuple(int(value) for value in tags[_EXTRA]) if _EXTRA in tags else (),
        colours=tags.get(_COLOURS),
        reduced=reduced,
        parts=parts,
        part_pixels=int(tags[_TILE_WIDTH][0]) * int(tags[_TILE_HEIGHT][0]) if tiled else 0,
    )


def check_cost(content: bytes, page: TiffPage, max_pixels: int) -> None:
    """Refuses unsupported pages, and those that take far longer to decode than their pixels justify.

    Raises:
        InvalidPictureError: with what to do instead.
    """
    if page.compression not in _COMPRESSIONS:
        raise InvalidPictureError(
            "is a TIFF file with a compression that is not accepted; save it with LZW, deflate, JPEG or none, or as PNG"
        )
    if page.parts > _MAX_PARTS or page.part_pixels > max_pixels:
        raise InvalidPictureError(
            f"is a TIFF file of more than {_MAX_PARTS} strips or tiles, or of tiles larger than the limit of pixels; "
            "save it in ordinary strips"
        )
    if page.compression in _JPEG and content.count(b"\xff\xda") > 4 * page.parts + _MAX_JPEG_SCANS:
        raise InvalidPictureError(
            f"is a TIFF file of JPEGs with more than {_MAX_JPEG_SCANS} scans; save it with LZW, deflate or none"
        )
