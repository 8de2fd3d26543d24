"""Parses a DICOM file to its attributes and the location of its pixel data (DICOM PS3.5 and PS3.10).

What the bytes are decides, not what they are said to be: the preamble, the file meta information and the transfer
syntax may be missing or wrong. pydicom reads the attributes up to the pixel data; the pixel data themselves are not
copied.
"""

import io
import zlib
from dataclasses import dataclass, replace

from pydicom import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import UID
from pydicom.valuerep import VR

from echovlm_ray.vision.dicom.errors import InvalidDicomError
from echovlm_ray.vision.dicom.resync import repaired_elements

PIXEL_KEYWORDS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
UNDEFINED_LENGTH = 0xFFFFFFFF
# An inflated file may have this many bytes in addition to its pixels.
HEADER_BYTES = 4 * 1024**2
# GE's private syntax: attributes are implicit little endian, pixel data are big endian.
_GE_BIG_ENDIAN_PIXELS = "1.2.840.113619.5.2"
_PREAMBLE_BYTES = 128
_MAGIC = b"DICM"
_EXPLICIT_VRS = frozenset(vr.value.encode() for vr in VR if len(vr.value) == 2)
_LONG_VRS = frozenset((b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"UN", b"SQ", b"UT", b"UC", b"UR", b"SV", b"UV"))
# The group of a file's first attribute: the meta information, the command set's leftovers, or identification.
_FIRST_GROUPS = frozenset((0x0002, 0x0008))
_LAST_FIRST_GROUP = 0x0040


@dataclass(frozen=True, slots=True)
class Encoding:
    """How attributes are written."""

    implicit: bool
    little_endian: bool


@dataclass(frozen=True, slots=True)
class PixelElement:
    """The pixel data element.

    Attributes:
        keyword: PixelData, FloatPixelData or DoubleFloatPixelData.
        vr: as written, or None where values have no written type (implicit VR).
        length: as written, None where it is undefined.
        content: the file.
        start: where in it the element's value starts.
        little_endian: whether values of several bytes are.
    """

    keyword: str
    vr: str | None
    length: int | None
    content: bytes
    start: int
    little_endian: bool

    @property
    def rest(self) -> memoryview:
        """Everything from the first byte of the value to the end of the file."""
        return memoryview(self.content)[self.start :]


@dataclass(frozen=True, slots=True)
class ParsedFile:
    """A DICOM file taken apart; `pixels` is None where it has none."""

    dataset: Dataset
    transfer_syntax: UID | None
    pixels: PixelElement | None


def is_dicom(content: bytes) -> bool:
    """Whether the bytes are a DICOM file, with or without its preamble and its meta information."""
    if content[_PREAMBLE_BYTES : _PREAMBLE_BYTES + 4] == _MAGIC or content.startswith(_MAGIC):
        return True
    return _bare_start(content) is not None


def parse(content: bytes, *, max_bytes: int, notices: list[str]) -> ParsedFile:
    """Takes a file apart.

    Args:
        content: the whole file.
        max_bytes: to which a deflated file may be inflated.
        notices: what was found to be otherwise than written is added here.

    Raises:
        InvalidDicomError: the attributes cannot be read, or are inflated to more than `max_bytes`.
    """
    start = _start(content, notices)
    transfer_syntax, start = _meta(content, start, notices)
    encoding = _encoding(content[start : start + 8])
    if encoding is None:
        inflated = _inflated(content[start:], max_bytes, notices)
        content, start = (content, start) if inflated is None else (inflated, 0)
        encoding = _encoding(content[start : start + 8]) or _labelled_encoding(transfer_syntax)
    elif transfer_syntax is not None and "Deflate" in transfer_syntax.name:
        notices.append("is not deflated although its Transfer Syntax UID says so; it is read as it is")
    if transfer_syntax is not None:
        _compare(transfer_syntax, encoding, notices)
    dataset, pixels = _attributes(content, start, encoding, notices)
    if pixels is not None and transfer_syntax == _GE_BIG_ENDIAN_PIXELS:
        pixels = replace(pixels, little_endian=False)
    return ParsedFile(dataset, transfer_syntax, pixels)


def _start(content: bytes, notices: list[str]) -> int:
    if content[_PREAMBLE_BYTES : _PREAMBLE_BYTES + 4] == _MAGIC:
        return _PREAMBLE_BYTES + 4
    notices.append("has no preamble of 128 bytes with the letters DICM behind it; it is read without")
    if content.startswith(_MAGIC):
        return len(_MAGIC)
    return _bare_start(content) or 0


def _bare_start(content: bytes) -> int | None:
    """Where the attributes start in a file without the letters DICM."""
    for start in (0, _PREAMBLE_BYTES):
        head = content[start : start + 8]
        if start and any(content[:start]):
            return None
        encoding = _encoding(head)
        if encoding is not None and _group(head, encoding.little_endian) in _FIRST_GROUPS:
            return start
    return None


def _group(head: bytes, little_endian: bool) -> int:
    return int.from_bytes(head[:2], "little" if little_endian else "big")


def _encoding(head: bytes) -> Encoding | None:
    """How the attribute is written whose first eight bytes these are; None where it is no attribute."""
    if len(head) < 8:
        return None
    # Files start with a low group, so that the byte order with the lower number is the right one.
    little_endian = _group(head, True) <= _group(head, False)
    if not 0 < _group(head, little_endian) <= _LAST_FIRST_GROUP:
        return None
    if head[4:6] in _EXPLICIT_VRS:
        return Encoding(implicit=False, little_endian=little_endian)
    length = int.from_bytes(head[4:8], "little" if little_endian else "big")
    if length < 0x10000 or length == UNDEFINED_LENGTH:
        return Encoding(implicit=True, little_endian=little_endian)
    return None


def _meta(content: bytes, start: int, notices: list[str]) -> tuple[UID | None, int]:
    """The transfer syntax, and the end of the File Meta Information. Its group length is ignored."""
    encoding = _encoding(content[start : start + 8])
    if encoding is None or _group(content[start : start + 2], encoding.little_endian) != 2:
        notices.append("has no File Meta Information; how it is encoded was found from its bytes")
        return None, start
    buffer = io.BytesIO(content)
    buffer.seek(start)
    try:
        meta = read_dataset(buffer, encoding.implicit, encoding.little_endian, stop_when=_beyond_meta)
    except Exception:
        raise InvalidDicomError("has File Meta Information that cannot be read; export it again") from None
    try:
        transfer_syntax = UID(str(meta.TransferSyntaxUID).strip("\0 "))
    except Exception:
        transfer_syntax = None
    if not transfer_syntax:
        notices.append("has no Transfer Syntax UID (0002,0010); how it is encoded was found from its bytes")
        return None, buffer.tell()
    return transfer_syntax, buffer.tell()


def _beyond_meta(tag: int, vr: str | None, length: int) -> bool:
    return tag >> 16 != 2


def _compare(transfer_syntax: UID, encoding: Encoding, notices: list[str]) -> None:
    if not transfer_syntax.is_transfer_syntax or transfer_syntax.is_private:
        return
    if (transfer_syntax.is_implicit_VR, transfer_syntax.is_little_endian) != (
        encoding.implicit,
        encoding.little_endian,
    ):
        notices.append("has attributes that are encoded otherwise than its Transfer Syntax UID says; the bytes decide")


def _labelled_encoding(transfer_syntax: UID | None) -> Encoding:
    """The transfer syntax's encoding, for files with an unusual first attribute."""
    if transfer_syntax is None or not transfer_syntax.is_transfer_syntax or transfer_syntax.is_private:
        return Encoding(implicit=False, little_endian=True)
    return Encoding(transfer_syntax.is_implicit_VR, transfer_syntax.is_little_endian)


def _inflated(compressed: bytes, max_bytes: int, notices: list[str]) -> bytes | None:
    limit = max_bytes + HEADER_BYTES
    # PS3.5 A.5 is deflate without a header; some writers add that of zlib or gzip.
    for window_bits in (-zlib.MAX_WBITS, zlib.MAX_WBITS, zlib.MAX_WBITS | 16):
        inflater = zlib.decompressobj(window_bits)
        try:
            content = inflater.decompress(compressed, limit + 1)
        except zlib.error:
            continue
        if _encoding(content[:8]) is None:
            continue
        if len(content) > limit:
            raise InvalidDicomError(
                f"is deflated and inflates to more than {limit} bytes, the limit for its pixels "
                "(gateway.max_image_pixels): send fewer frames or a smaller picture"
            )
        if not inflater.eof:
            notices.append("is deflated and cut off before its end")
        return content
    return None


def _attributes(
    content: bytes, start: int, encoding: Encoding, notices: list[str]
) -> tuple[Dataset, PixelElement | None]:
    buffer = io.BytesIO(content)
    buffer.seek(start)
    try:
        dataset = read_dataset(buffer, encoding.implicit, encoding.little_endian, stop_when=_holds_pixels)
        pixels = _pixel_element(content, buffer.tell(), encoding)
    except Exception:
        # Any exception: what a parser raises on hostile bytes is not to be foreseen.
        dataset, pixels = Dataset(), None
    if pixels is not None:
        return dataset, pixels
    repaired = repaired_elements(content, start, encoding.implicit, encoding.little_endian, frozenset(PIXEL_KEYWORDS))
    if repaired is None:
        if not len(dataset):
            raise InvalidDicomError(
                "ends before its pixel data, or has attributes that cannot be read; export it again"
            )
        return dataset, None
    elements, position = repaired
    try:
        dataset = read_dataset(io.BytesIO(elements), encoding.implicit, encoding.little_endian)
    except Exception:
        raise InvalidDicomError("has attributes that cannot be read; export it again") from None
    notices.append("has an attribute whose written length is wrong; reading went on at the next one")
    return dataset, _pixel_element(content, position, encoding)


def _holds_pixels(tag: int, vr: str | None, length: int) -> bool:
    return tag in PIXEL_KEYWORDS


def _pixel_element(content: bytes, position: int, encoding: Encoding) -> PixelElement | None:
    order = "little" if encoding.little_endian else "big"
    head = content[position : position + 12]
    if len(head) < 8:
        return None
    tag = int.from_bytes(head[:2], order) << 16 | int.from_bytes(head[2:4], order)  # type: ignore[arg-type]
    if tag not in PIXEL_KEYWORDS:
        return None
    vr, length, size = None, int.from_bytes(head[4:8], order), 8  # type: ignore[arg-type]
    if not encoding.implicit and head[4:6] in _EXPLICIT_VRS:
        vr = head[4:6].decode("ascii")
        if head[4:6] in _LONG_VRS:
            length, size = int.from_bytes(head[8:12], order), 12  # type: ignore[arg-type]
        else:
            length, size = int.from_bytes(head[6:8], order), 8  # type: ignore[arg-type]
    stated = None if length == UNDEFINED_LENGTH else length
    return PixelElement(PIXEL_KEYWORDS[tag], vr, stated, content, position + size, encoding.little_endian)
