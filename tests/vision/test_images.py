"""Files in, RGB out; and whatever else comes is refused with a reason. Further kinds: `test_stills`, `test_video`."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.vision.codestream import frame_size
from echovlm_ray.vision.images import DecodedImage, ImageLimits, decode_image_file
from echovlm_ray.vision.sampling import sample_frames
from tests.vision.dicom_samples import real

LIMITS = ImageLimits(max_image_bytes=8 * 1024**2, max_image_pixels=1_000_000, max_frames=8)
RED_BLUE = np.concatenate([np.full((40, 30, 3), (250, 10, 10)), np.full((40, 30, 3), (10, 10, 250))], 1).astype(
    np.uint8
)


def decode(content: bytes, limits: ImageLimits = LIMITS) -> DecodedImage:
    return decode_image_file(content, limits=limits, field="images[2].content")


def refused(content: bytes, limits: ImageLimits = LIMITS) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        decode(content, limits)
    assert caught.value.field == "images[2].content"
    return caught.value.description


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encoded(Image.fromarray(RED_BLUE), "PNG")
JPEG = encoded(Image.fromarray(RED_BLUE), "JPEG", quality=95, subsampling=0)


def test_png_is_exact_and_jpeg_is_close() -> None:
    assert np.array_equal(decode(PNG).frames[0], RED_BLUE)
    assert np.abs(decode(JPEG).frames[0].astype(int) - RED_BLUE).max() < 12
    assert not decode(PNG).is_video


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:20, :30] = (250, 10, 10)
    content = encoded(Image.fromarray(picture), "JPEG", exif=exif, quality=95, subsampling=0)
    frame = decode(content).frames[0]
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert frame.shape == ((40, 60, 3) if orientation < 5 else (60, 40, 3))
    rows, columns = corner[orientation]
    assert frame[rows, columns, 0] > 200
    assert frame[-1 - rows, -1 - columns, 0] < 50


def test_palettes_greys_and_cmyk() -> None:
    assert np.array_equal(decode(encoded(Image.fromarray(RED_BLUE).quantize(4), "PNG")).frames[0], RED_BLUE)
    grey = Image.fromarray(np.full((32, 32), 77, np.uint8))
    assert (decode(encoded(grey, "PNG")).frames[0] == 77).all()
    assert (decode(encoded(grey, "JPEG", quality=100)).frames[0] == 77).all()
    assert (decode(encoded(grey.convert("1"), "PNG")).frames[0][0, 0] % 255 == 0).all()
    cmyk = encoded(Image.fromarray(RED_BLUE).convert("CMYK"), "JPEG", quality=95, subsampling=0)
    assert np.abs(decode(cmyk).frames[0].astype(int) - RED_BLUE).max() < 16


def test_sixteen_bit_greyscale_keeps_its_range() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    frame = decode(encoded(Image.fromarray(ramp), "PNG")).frames[0]
    assert np.array_equal(frame[..., 0], np.rint(ramp / 257).astype(np.uint8))


def test_what_is_transparent_is_black() -> None:
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:, :16] = (255, 255, 255, 255)
    rgba[:, 16:] = (200, 100, 50, 0)
    frame = decode(encoded(Image.fromarray(rgba), "PNG")).frames[0]
    assert (frame[:, :16] == 255).all()
    assert (frame[:, 16:] == 0).all()
    grey_alpha = Image.fromarray(np.stack([np.full((8, 8), 200, np.uint8), np.full((8, 8), 128, np.uint8)], -1), "LA")
    assert abs(int(decode(encoded(grey_alpha, "PNG")).frames[0][0, 0, 0]) - 100) <= 1
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([200, 100, 50])
    assert (decode(encoded(palette, "PNG", transparency=0)).frames[0] == 0).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not an image file that is known here"),
        (b"OggS" + bytes(40), "Ogg"),
        (b"%PDF-1.4", "PDF"),
        (PNG[:8], "damaged or truncated"),
        (JPEG[:3], "damaged or truncated"),
        (JPEG[: len(JPEG) // 2], "damaged or truncated"),
    ],
)
def test_refusals_say_what_came_and_what_to_send(content: bytes, reason: str) -> None:
    description = refused(content)
    assert reason in description
    assert "send a PNG, JPEG or DICOM" in description or "export it again" in description


# The last 16 bytes hold no pixel: the mark of the end, and the checksum before it.
@pytest.mark.parametrize("cut", [17, 40, len(PNG) // 2])
def test_every_png_that_is_truncated_within_its_pixels_is_refused(cut: int) -> None:
    assert "truncated" in refused(PNG[:-cut])


def test_truncated_images_are_not_tolerated_anywhere_in_the_process() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_ffmpeg_is_loaded_for_videos_only() -> None:
    code = "import sys, echovlm_ray.vision.images; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_limit_of_bytes_is_named() -> None:
    limits = ImageLimits(max_image_bytes=len(PNG) - 1, max_image_pixels=10**6, max_frames=8)
    assert f"has {len(PNG)} bytes and the limit is {len(PNG) - 1} (gateway.max_image_bytes)" in refused(PNG, limits)


def lying_png(width: int, height: int) -> bytes:
    header = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    return PNG[:8] + _chunk(b"IHDR", header) + PNG[33:]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_decompression_bombs_are_refused_before_decoding() -> None:
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000
    assert "gateway.max_image_pixels" in refused(bomb)
    assert "2000 × 1000 pixels" in refused(encoded(Image.new("1", (2000, 1000)), "PNG"))
    assert "gateway.max_image_pixels" in refused(lying_png(100_000, 100_000))
    assert "truncated" in refused(lying_png(800, 800))


def test_codestream_sizes() -> None:
    assert frame_size(JPEG) is not None
    size = frame_size(JPEG)
    assert size is not None
    assert (size.width, size.height, size.samples) == (60, 40, 3)
    size = frame_size(encoded(Image.fromarray(RED_BLUE), "JPEG2000", no_jp2=True))
    assert size is not None
    assert (size.width, size.height, size.samples) == (60, 40, 3)
    size = frame_size(encoded(Image.fromarray(RED_BLUE), "JPEG2000"))
    assert size is not None
    assert (size.width, size.height) == (60, 40)
    assert frame_size(b"\xff\xd8\xff\xff\xff\xff") is None
    assert frame_size(PNG) is None


@given(num_frames=st.integers(1, 5000), max_frames=st.integers(2, 64))
def test_sampled_frames_are_even_spread_and_within(num_frames: int, max_frames: int) -> None:
    indices = sample_frames(num_frames, max_frames)
    assert list(indices) == sorted(indices)
    assert (indices[0], indices[-1]) == (0, num_frames - 1)
    assert len(indices) == 1 if num_frames == 1 else len(indices) % 2 == 0
    assert len(indices) <= max(max_frames, 2)
    if len(indices) > 2 and len(set(indices)) == len(indices):
        gaps = np.diff(indices)
        assert gaps.max() - gaps.min() <= 1


SEEDS = [
    PNG,
    JPEG,
    encoded(Image.fromarray(RED_BLUE).quantize(4), "PNG"),
    real("ExplVR_BigEnd.dcm"),
    real("examples_ybr_color.dcm")[:60_000],
    real("JPGLosslessP14SV1_1s_1f_8b.dcm"),
    real("OBXXXX1A_rle.dcm"),
    real("US1_J2KR.dcm"),
]


def survives(content: bytes) -> None:
    try:
        image = decode(content)
    except InvalidRequestError:
        return
    assert all(frame.dtype == np.uint8 and frame.ndim == 3 for frame in image.frames)


@given(content=st.binary(max_size=400), prefix=st.sampled_from([b"", PNG[:33], JPEG[:20], b"\0" * 128 + b"DICM"]))
@settings(max_examples=150, deadline=None)
def test_random_bytes_never_do_worse_than_being_refused(content: bytes, prefix: bytes) -> None:
    survives(prefix + content)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
def test_damaged_files_never_do_worse_than_being_refused(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    # Most of what can be broken lies in the headers.
    span = data.draw(st.sampled_from([200, 2000, len(content)]))
    places = st.integers(0, min(span, len(content)) - 1)
    for position, bit in data.draw(st.lists(st.tuples(places, st.integers(0, 7)), max_size=6)):
        content[position] ^= 1 << bit
    survives(bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content))
