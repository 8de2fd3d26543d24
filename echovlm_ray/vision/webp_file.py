"""WebP files (RFC 9649): their chunks, read before a decoder allocates the canvas."""

from dataclasses import dataclass, field

from echovlm_ray.vision.picture import InvalidPictureError

_MAX_CHUNKS = 100_000


@dataclass(slots=True)
class WebpFile:
    """The contents of a WebP's chunks.

    Attributes:
        width: of the canvas, pixels.
        height: likewise.
        animation_frames: the number of complete frames of an animation; 0 for a still.
        exif: the contents of the EXIF chunk.
        xmp: the contents of the XMP chunk.
    """

    width: int = 0
    height: int = 0
    animation_frames: int = 0
    exif: bytes = b""
    xmp: bytes = field(default=b"", repr=False)


def read_webp(content: bytes) -> WebpFile:
    """Reads all chunks.

    Raises:
        InvalidPictureError: no chunk gives a size.
    """
    webp = WebpFile()
    offset = 12
    for _ in range(_MAX_CHUNKS):
        if offset + 8 > len(content):
            break
        kind, length = content[offset : offset + 4], int.from_bytes(content[offset + 4 : offset + 8], "little")
        _read_chunk(webp, kind, content, offset + 8, length)
        offset += 8 + length + length % 2
    if not webp.width:
        raise InvalidPictureError("is a WebP file that is damaged or truncated; export it again")
    return webp


def with_right_length(content: bytes) -> bytes:
    """The file with the length in its header that it has, and with the byte that makes its last chunk even."""
    stated = int.from_bytes(content[4:8], "little") + 8
    first = 20 + int.from_bytes(content[16:20], "little")
    if first <= stated <= len(content):
        return content
    content += bytes(len(content) % 2)
    return content[:4] + (len(content) - 8).to_bytes(4, "little") + content[8:]


def _read_chunk(webp: WebpFile, kind: bytes, content: bytes, start: int, length: int) -> None:
    head = content[start : start + min(length, 10)].ljust(10, b"\x00")
    if kind == b"ANMF":
        webp.animation_frames += 1
    elif kind == b"EXIF":
        webp.exif = content[start : start + length]
    elif kind == b"XMP ":
        webp.xmp = content[start : start + length]
    elif webp.width:
        return
    elif kind == b"VP8X":
        webp.width = 1 + int.from_bytes(head[4:7], "little")
        webp.height = 1 + int.from_bytes(head[7:10], "little")
    elif kind == b"VP8L":
        sizes = int.from_bytes(head[1:5], "little")
        webp.width, webp.height = 1 + (sizes & 0x3FFF), 1 + (sizes >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        webp.width = int.from_bytes(head[6:8], "little") & 0x3FFF
        webp.height = int.from_bytes(head[8:10], "little") & 0x3FFF
