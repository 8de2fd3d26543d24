"""Stills that cost more than they are worth, other kinds, and damage of any sort."""

import struct

import imagecodecs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.vision.images import ImageLimits
from echovlm_ray.vision.jpeg_file import MAX_SCANS
from echovlm_ray.vision.kinds import file_kind
from tests.vision.still_samples import CASES, GREY, RGB, decode, encoded, exif, grey_tags, refused, tiff


# Files that cost more than they are worth.
def test_many_scans_are_refused_before_decoding() -> None:
    assert f"more than {MAX_SCANS} scans" in refused(
        (CASES / "prog2300.jpg").read_bytes(), ImageLimits(8 * 1024**2, 40_000_000, 8)
    )
    jpeg = encoded(RGB, "JPEG", progressive=True)
    last = jpeg.rfind(b"\xff\xda")
    many = jpeg[:last] + jpeg[last:-2] * (MAX_SCANS + 1) + b"\xff\xd9"
    assert "scans" in refused(many)
    few = jpeg[:last] + jpeg[last:-2] * 20 + b"\xff\xd9"
    assert decode(few).frames[0].shape == RGB.shape
    # The larger the picture, the fewer.
    assert "scans" in refused(few, ImageLimits(8 * 1024**2, 80 * 112, 8))
    # What only looks like scans is none: a colour profile, or a film behind the picture.
    behind = encoded(RGB, "JPEG", icc_profile=b"\xff\xda" * 2000) + b"\xff\xda" * 2000
    assert decode(behind).frames[0].shape == RGB.shape


def test_a_jpeg_of_nothing_but_segments_is_refused() -> None:
    jpeg = encoded(RGB, "JPEG")
    assert "damaged" in refused(jpeg[:2] + b"\xff\xe5\0\x02" * 1_000_000 + jpeg[2:])


def test_bytes_count_too_where_a_pixel_has_many() -> None:
    deep = np.zeros((80, 112, 4), np.uint16)
    tight = ImageLimits(8 * 1024**2, 80 * 112, 8)
    for content in (imagecodecs.png_encode(deep), imagecodecs.tiff_encode(np.zeros((80, 112), np.float64))):
        assert "pixels of 8 bytes and the limit is 53760 bytes, 6 a pixel" in refused(content, tight)
    assert decode(imagecodecs.png_encode(deep[..., :3].copy()), tight).frames[0].shape == (80, 112, 3)


def test_fill_bytes_of_jpeg_are_stepped_over() -> None:
    jpeg = encoded(RGB, "JPEG")
    filled = jpeg[:2] + b"\xff" * 3_000_000 + jpeg[2:]
    assert np.array_equal(decode(filled).frames[0], decode(jpeg).frames[0])
    assert "damaged" in refused(jpeg[:2] + b"\xff" * 3_000_000)


def test_an_animation_of_too_many_small_frames_is_refused() -> None:
    frames = [Image.new("L", (4, 4), index) for index in (0, 255)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    last = content[content.rindex(b"!\xf9") : -1]
    assert decode(content[:-1] + last * 10 + b";").source_frames == 12
    assert "at most 5000 frames" in refused(content[:-1] + last * 5000 + b";")
    assert "blocks" in refused(content[:-1] + b"!\xfe" + b"\x01a" * 1_000_000 + b"\0;")


def test_jpeg2000_of_millions_of_packets_is_refused() -> None:
    content = bytearray(encoded(RGB, "JPEG2000", no_jp2=True))
    coding = content.index(b"\xff\x52")
    content[coding + 6 : coding + 8] = b"\xff\xff"
    assert "packets" in refused(bytes(content))
    size = content.index(b"\xff\x51")
    content[size + 22 : size + 30] = struct.pack(">II", 1, 1)
    assert "packets" in refused(bytes(content))


def test_sizes_are_checked_before_anything_is_allocated() -> None:
    limits = ImageLimits(8 * 1024**2, 80 * 112 - 1, 8)
    for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "JPEG2000"):
        assert "gateway.max_image_pixels" in refused(encoded(RGB, kind), limits)
    assert "gateway.max_image_pixels" in refused(imagecodecs.jpegls_encode(RGB), limits)
    webp = bytearray(encoded(RGB, "WEBP", exif=exif(1)))
    webp[24:30] = b"\xff\xff\xff\xff\xff\xff"
    assert "gateway.max_image_pixels" in refused(bytes(webp))


def test_tiff_that_goes_in_circles_or_beyond_its_end_is_refused() -> None:
    content = tiff(GREY.tobytes(), grey_tags(8, 1))
    assert "truncated" in refused(content[:8] + content[2000:])
    (start,) = struct.unpack_from("<I", content, 4)
    circle = content[:-4] + struct.pack("<I", start)
    assert np.array_equal(decode(circle).frames[0][..., 0], GREY)
    beyond = tiff(GREY.tobytes()[:100], {**grey_tags(8, 1), 279: (80 * 112,)})
    assert "truncated" in refused(beyond)


def test_an_animation_of_too_many_pixels_is_refused() -> None:
    frames = [Image.new("L", (400, 400), index) for index in range(100)]
    for kind in ("GIF", "PNG"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert "pixels" in refused(content, ImageLimits(8 * 1024**2, 400 * 400 * 2, 2))


# Other kinds, and mutation.
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\0\0\0\x1cftypheic" + bytes(20), "HEIC"),
        (b"\0\0\0\x1cftypavif" + bytes(20), "AVIF"),
        (b"%PDF-1.7", "PDF"),
        (b"PK\x03\x04", "ZIP"),
        (b"#EXTM3U\nfile:///etc/passwd", "playlist"),
        (b"BM and other text", "known here"),
        (b"RIFF\0\0\0\0WAVE", "WAV"),
    ],
)
def test_other_kinds_are_named(content: bytes, kind: str) -> None:
    description = refused(content)
    assert kind in description
    assert "send a PNG, JPEG or DICOM" in description
    assert "passwd" not in description


SEEDS = [
    encoded(RGB, "PNG"),
    imagecodecs.png_encode(RGB.astype(np.uint16) * 16),
    encoded(RGB, "JPEG", exif=b"Exif\0\0" + exif(6)),
    encoded(RGB, "JPEG", progressive=True),
    imagecodecs.jpeg8_encode(GREY.astype(np.uint16) * 16, level=90, bitspersample=12),
    imagecodecs.jpegls_encode(RGB),
    encoded(RGB, "JPEG2000"),
    imagecodecs.jpeg2k_encode(GREY.astype(np.uint16) * 16, level=0, bitspersample=12),
    encoded(RGB, "TIFF", compression="tiff_lzw"),
    imagecodecs.tiff_encode(GREY.astype(np.uint16)),
    encoded(RGB, "BMP"),
    encoded(RGB, "WEBP", exif=exif(3)),
    encoded(RGB, "GIF", save_all=True, append_images=[Image.fromarray(RGB[::-1])]),
    encoded(RGB, "PNG", save_all=True, append_images=[Image.fromarray(RGB[::-1])]),
]


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
def test_damaged_stills_are_taken_or_refused(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    span = data.draw(st.sampled_from([64, 400, len(content)]))
    places = st.integers(0, min(span, len(content)) - 1)
    for position, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6)):
        content[position] = value
    damaged = bytes(content[: data.draw(st.integers(1, len(content)))] if data.draw(st.booleans()) else content)
    try:
        image = decode(damaged)
    except InvalidRequestError:
        return
    assert all(frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3 for frame in image.frames)
    assert len({frame.shape for frame in image.frames}) == 1


def test_kinds_are_told_by_content() -> None:
    kinds = {"PNG": "PNG", "JPEG": "JPEG", "BMP": "BMP", "GIF": "GIF", "WEBP": "WebP", "TIFF": "TIFF"}
    assert {kind: file_kind(encoded(RGB, kind)) for kind in kinds} == kinds
    assert file_kind(encoded(RGB, "JPEG2000")) == file_kind(encoded(RGB, "JPEG2000", no_jp2=True)) == "JPEG 2000"
    assert file_kind(b"") is None
