"""JPEG and JPEG-LS files (ISO 10918-1, 14495-1): their markers, read before a decoder is given anything.

Decoders spend time for each scan, so scans are counted first; their parsers of EXIF and the like fail on what does not
concern the picture, so those segments are left out.
"""

import re
from dataclasses import dataclass, field

from echovlm_ray.vision.picture import InvalidPictureError

END = b"\xff\xd9"
JPEG_LS = 0xF7
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {JPEG_LS}
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_HIERARCHICAL = frozenset((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF))
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD9)))
_SCAN, _RESTART_INTERVAL = 0xDA, 0xDD
_JFIF, _EXIF, _PICTURES, _SPIFF, _ADOBE = 0xE0, 0xE1, 0xE2, 0xE8, 0xEE
_COMMENT = 0xFE
_XMP = b"http://ns.adobe.com/xap/1.0/\x00"
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_SEGMENT = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)
_RESTART = re.compile(rb"\xff[\xd0-\xd7]", re.DOTALL)
# Segments before the first scan. A colour profile has at most 255, other applications a few.
_MAX_SEGMENTS = 2000
# Ordinary progressive files have about ten, and libjpeg-turbo's authors advise to stop at some hundreds.
MAX_SCANS = 100
# Scans times pixels, in multiples of the limit of pixels: a few scans of a very large picture are as slow as many.
MAX_SCANNED = 16


@dataclass(slots=True)
class JpegFile:
    """The contents of a JPEG's markers.

    Attributes:
        width: pixels.
        height: likewise.
        precision: bits of a value.
        samples: values of a pixel.
        process: the marker of the frame, 0xC0 for baseline, 0xF7 for JPEG-LS and so on.
        exif: the contents of the first EXIF segment.
        xmp: the contents of the first XMP segment.
        holds_several: whether more pictures follow the first.
        body: the file without segments that do not concern the picture; `scans_at` is a place in it.
        scans_at: where the first scan begins.
    """

    width: int = 0
    height: int = 0
    precision: int = 8
    samples: int = 0
    process: int = 0
    exif: bytes = b""
    xmp: bytes = field(default=b"", repr=False)
    holds_several: bool = False
    restart_interval: int = 0
    sampling: tuple[tuple[int, int, int], ...] = ()
    body: bytes = field(default=b"", repr=False)
    scans_at: int = 0

    @property
    def has_end(self) -> bool:
        """Whether there is an end marker, with or without data after it."""
        return self.body.rfind(END, self.scans_at) >= 0


def read_jpeg(content: bytes) -> JpegFile:
    """Reads everything before the first scan.

    Raises:
        InvalidPictureError: there is no frame or no scan, or the markers make no sense.
    """
    broken = InvalidPictureError("is a JPEG file that is damaged or truncated; export it again")
    jpeg = JpegFile()
    kept, offset, kept_from = [], 2, 0
    for _ in range(_MAX_SEGMENTS):
        found = _SEGMENT.search(content, offset)
        if found is None or found.end() + 2 > len(content):
            raise broken
        start = found.end() - 2
        if start > offset:
            # Fill bytes, which decoders step over one by one.
            kept.append(content[kept_from:offset])
            kept_from = start
        marker = content[start + 1]
        if marker in _WITHOUT_LENGTH:
            offset = start + 2
            continue
        end = start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")
        segment = content[start + 4 : end]
        if marker == _SCAN:
            if not jpeg.process:
                raise broken
            kept.append(content[kept_from:])
            jpeg.body = content if kept_from == 0 else b"".join(kept)
            jpeg.scans_at = len(jpeg.body) - (len(content) - start)
            return jpeg
        _note(jpeg, marker, segment)
        if _concerns_no_pixel(marker, segment):
            kept.append(content[kept_from:start])
            kept_from = end
        offset = end
    raise broken


def _concerns_no_pixel(marker: int, segment: bytes) -> bool:
    if marker == _COMMENT:
        return True
    if not 0xE0 <= marker <= 0xEF:
        return False
    # JFIF and Adobe say which colours the values are; SPIFF and what HP adds do so for JPEG-LS.
    return not (
        (marker == _JFIF and segment.startswith(b"JFIF\x00"))
        or (marker == _ADOBE and segment.startswith(b"Adobe"))
        or (marker == _SPIFF and segment.startswith((b"SPIFF\x00", b"mrfx")))
    )


def _note(jpeg: JpegFile, marker: int, segment: bytes) -> None:
    if marker in _START_OF_FRAME and len(segment) >= 6 and not jpeg.process:
        jpeg.process, jpeg.precision, jpeg.samples = marker, segment[0], segment[5]
        jpeg.height, jpeg.width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
        parts = [segment[at : at + 2] for at in range(6, len(segment) - 2, 3)]
        jpeg.sampling = tuple((part[0], part[1] >> 4, part[1] & 15) for part in parts)
    elif marker == _EXIF and segment.startswith(b"Exif\x00\x00") and not jpeg.exif:
        jpeg.exif = segment
    elif marker == _EXIF and segment.startswith(_XMP) and not jpeg.xmp:
        jpeg.xmp = segment
    elif marker == _PICTURES and segment.startswith(b"MPF\x00"):
        jpeg.holds_several = True
    elif marker == _RESTART_INTERVAL:
        jpeg.restart_interval = int.from_bytes(segment[:2], "big")


def check_cost(jpeg: JpegFile, max_pixels: int) -> None:
    """Refuses files whose scans take far longer to decode than their pixels do.

    Raises:
        InvalidPictureError: too many scans, or an unsupported kind of JPEG.
    """
    if jpeg.process in _HIERARCHICAL:
        raise InvalidPictureError("is a hierarchical JPEG, which is not accepted; save it as baseline JPEG or PNG")
    most = min(MAX_SCANS, max(1, MAX_SCANNED * max_pixels // (jpeg.width * jpeg.height)))
    # Counting the bytes is quick and never too few; only when it is too many is it worth looking closely.
    if jpeg.body.count(b"\xff\xda", jpeg.scans_at) <= most:
        return
    if len(_scan_headers(jpeg, most + 1)) > most:
        raise InvalidPictureError(
            f"is a JPEG of more than {most} scans, the limit for a picture of its size; save it as baseline JPEG or PNG"
        )


def _scan_headers(jpeg: JpegFile, most: int) -> list[bytes]:
    """The headers of the scans up to the end of the picture, or the first `most`."""
    headers: list[bytes] = []
    offset = jpeg.scans_at
    while len(headers) < most and (found := _MARKER.search(jpeg.body, offset)):
        marker = found[0][1]
        if marker == END[1]:
            break
        offset = found.end()
        if marker in _WITHOUT_LENGTH:
            continue
        end = offset + int.from_bytes(jpeg.body[offset : offset + 2], "big")
        if marker == _SCAN:
            headers.append(jpeg.body[offset + 2 : end])
        offset = max(end, offset + 2)
    return headers


def may_be_complete(jpeg: JpegFile) -> bool:
    """Whether a file without end marker may still have every pixel, by its scans and restart markers.

    A file that is cut between two scans, or where decoding starts again, decodes without any complaint: what is missing
    is grey or coarse.
    """
    headers = _scan_headers(jpeg, MAX_SCANS)
    shown: set[int] = set()
    # For each component, the bit of each coefficient that came last: 0 when it is whole.
    left = {component: [1] * 64 for component, _, _ in jpeg.sampling}
    for header in headers:
        if not header or len(header) < 4 + 2 * header[0]:
            return False
        components = [header[1 + 2 * index] for index in range(header[0])]
        first, last, low = header[-3], header[-2], header[-1] & 15
        shown.update(components)
        for component in components:
            if jpeg.process in _PROGRESSIVE and component in left:
                left[component][first : last + 1] = [low] * (last + 1 - first)
    if not {component for component, _, _ in jpeg.sampling} <= shown:
        return False
    if jpeg.process in _PROGRESSIVE and any(map(any, left.values())):
        return False
    if not jpeg.restart_interval:
        return True
    if len(headers) > 1:
        return False
    across, down = (max(part[axis] for part in jpeg.sampling) if jpeg.samples > 1 else 1 for axis in (1, 2))
    units = -(-jpeg.width // (8 * across)) * -(-jpeg.height // (8 * down))
    restarts = len(_RESTART.findall(jpeg.body, jpeg.scans_at))
    return restarts >= -(-units // jpeg.restart_interval) - 1
