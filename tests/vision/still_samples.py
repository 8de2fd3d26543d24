"""Still images made for the tests, and what they are decoded with."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.vision.images import DecodedImage, ImageLimits, decode_image_file

CASES = Path(__file__).parents[1] / "cases"


LIMITS = ImageLimits(max_image_bytes=8 * 1024**2, max_image_pixels=1_000_000, max_frames=8)


_ROWS, _COLUMNS = np.mgrid[0:80, 0:112]


GREY = ((np.sin(_COLUMNS / 9) + np.cos(_ROWS / 7) + 2) / 4 * 255).astype(np.uint8)


RGB = np.stack([GREY, 255 - GREY, GREY // 2], -1)


def decode(content: bytes | bytearray, limits: ImageLimits = LIMITS) -> DecodedImage:
    return decode_image_file(bytes(content), limits=limits, field="images[0].content")


def refused(content: bytes | bytearray, limits: ImageLimits = LIMITS) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        decode(content, limits)
    return caught.value.description


def encoded(picture: npt.NDArray[Any] | Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, kind, **options)
    return buffer.getvalue()


def difference(frame: npt.NDArray[Any], right: npt.NDArray[Any]) -> float:
    right = right if right.ndim == 3 else np.repeat(right[..., None], 3, -1)
    assert frame.shape == right.shape
    return float(np.abs(frame.astype(float) - right).mean())


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    found, offset = [], 8
    while offset < len(png):
        length = int.from_bytes(png[offset : offset + 4], "big")
        found.append((png[offset + 4 : offset + 8], png[offset + 8 : offset + 8 + length]))
        offset += 12 + length
    return found


def with_chunks(png: bytes, *extra: bytes) -> bytes:
    return png[:33] + b"".join(extra) + png[33:]


# Orientation.
def exif(orientation: int, broken_neighbour: bool = False) -> bytes:
    entries = [struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)]
    if broken_neighbour:
        entries.append(struct.pack("<HHII", 0x011A, 5, 1, 0xFFFFFF))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def tiff(values: bytes, tags: dict[int, tuple[int, ...]]) -> bytes:
    """A TIFF written by hand: shorts or longs only, one strip."""
    body, entries = b"II*\0\0\0\0\0" + values + bytes(len(values) % 2), []
    tags = {273: (8,), 279: (len(values),), **tags}
    for tag, numbers in sorted(tags.items()):
        long = tag in (273, 279)
        data = struct.pack(f"<{len(numbers)}{'I' if long else 'H'}", *numbers)
        if len(data) > 4:
            place, body = struct.pack("<I", len(body)), body + data
        else:
            place = data.ljust(4, b"\0")
        entries.append(struct.pack("<HHI", tag, 4 if long else 3, len(numbers)) + place)
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return body[:4] + struct.pack("<I", len(body)) + body[8:] + directory


def grey_tags(bits: int, photometric: int) -> dict[int, tuple[int, ...]]:
    return {256: (112,), 257: (80,), 258: (bits,), 259: (1,), 262: (photometric,), 277: (1,), 278: (80,)}
