"""Detects the format of a file by its content, not by names or media types of callers.

The signatures are those of the formats' own specifications.
"""

import re

# Kinds that `stills` decodes.
STILLS = frozenset(("PNG", "JPEG", "WebP", "TIFF", "BMP", "GIF", "JPEG 2000"))
# Kinds that `video` decodes, each with the name of FFmpeg's demuxer for it.
VIDEOS = {
    "MP4": "mov",
    "AVI": "avi",
    "Matroska": "matroska",
    "WMV": "asf",
    "MPEG program stream": "mpeg",
    "MPEG transport stream": "mpegts",
    "MPEG video": "mpegvideo",
    "MPEG-4 video": "m4v",
    "H.264": "h264",
    "HEVC": "hevc",
}

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x1aE\xdf\xa3", "Matroska"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "WMV"),
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "ZIP"),
    (b"\x1f\x8b", "gzip"),
    (b"NRRD", "NRRD"),
    (b"OggS", "Ogg"),
    (b"FLV\x01", "FLV"),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"#EXTM3U", "playlist"),
    (b"ID3", "MP3"),
    (b"fLaC", "FLAC"),
)
_RIFF = {b"WEBP": "WebP", b"AVI ": "AVI", b"WAVE": "WAV"}
_QUICKTIME_BOXES = frozenset((b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"))
_STILL_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC"}
_BITMAP_HEADERS = frozenset((12, 16, 40, 52, 56, 64, 108, 124))
_START_CODE = re.compile(rb"\x00{2,16}\x01(..)", re.DOTALL)
_TRANSPORT_PACKETS = ((188, 0), (192, 4), (204, 0))


def file_kind(content: bytes) -> str | None:
    """The kind of file, under the name that a caller is shown; None if it is not known.

    JPEG-LS is a kind of JPEG here: the two differ only further down.
    """
    kind = next((kind for signature, kind in _SIGNATURES if content.startswith(signature)), None)
    if kind is not None:
        return kind
    if content.startswith(b"RIFF"):
        return _RIFF.get(content[8:12])
    if content.startswith(b"BM") and int.from_bytes(content[14:18], "little") in _BITMAP_HEADERS:
        return "BMP"
    if content[4:8] in _QUICKTIME_BOXES:
        return _STILL_BRANDS.get(content[8:12], "MP4") if content[4:8] == b"ftyp" else "MP4"
    return _elementary_stream(content) or _transport_stream(content)


def _elementary_stream(content: bytes) -> str | None:
    """MPEG streams without a container, by the first start code (ISO 13818-1, 13818-2, 14496-2, H.264, H.265)."""
    start = _START_CODE.match(content)
    if start is None:
        return None
    first, second = start[1]
    if first == 0xBA or 0xE0 <= first <= 0xEF:
        return "MPEG program stream"
    if first == 0xB3:
        return "MPEG video"
    if first in (0xB0, 0xB5) or first <= 0x01:
        return "MPEG-4 video"
    # Parameter sets, supplements and delimiters begin a stream: 32 to 35 and 39 in HEVC, 6, 7 and 9 in H.264.
    if second == 1 and first >> 1 in (32, 33, 34, 35, 39):
        return "HEVC"
    if first & 0x1F in (6, 7, 9) and not first & 0x80:
        return "H.264"
    return None


def _transport_stream(content: bytes) -> str | None:
    for size, first in _TRANSPORT_PACKETS:
        places = range(first, min(len(content), first + 5 * size), size)
        if len(places) >= 3 and all(content[place] == 0x47 for place in places):
            return "MPEG transport stream"
    return None
