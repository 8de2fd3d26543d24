"""Stored values to RGB: colour spaces, subsampling and planes, and attributes that are missing or contradictory."""

from typing import Any

import numpy as np
import pytest
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
)

from tests.vision.dicom_pixels import COLOURS, bits, decode, near, noticed, refused, ybr
from tests.vision.dicom_samples import encoded, made, made_compressed, picture

DARK = picture(48, 64) // 5


# --- Colours


def without_segments(jpeg: bytes, *markers: int) -> bytes:
    kept, at = jpeg[:2], 2
    while jpeg[at + 1] not in (0xC0, 0xC1, 0xC2):
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        kept += b"" if jpeg[at + 1] in markers else jpeg[at:end]
        at = end
    return kept + jpeg[at:]


@pytest.mark.parametrize(
    ("labelled", "stored", "says"),
    [
        (labelled, stored, says)
        for labelled in ("RGB", "YBR_FULL", "YBR_FULL_422")
        for stored in ("RGB", "YBR")
        for says in ("Adobe", "names", "JFIF", "nothing")
        # Where marker and attribute agree on YBR, nothing says otherwise.
        if (says, stored) != ("JFIF", "RGB") or labelled == "RGB"
    ],
)
def test_jpeg_frames_say_their_colours(labelled: str, stored: str, says: str) -> None:
    samples = COLOURS if stored == "RGB" else ybr()
    jpeg = encoded("jpeg8", samples, level=98, colorspace="RGB", outcolorspace="RGB", subsampling="444")
    jpeg = without_segments(jpeg, 0xE0, 0xEE)
    start = jpeg.index(b"\xff\xc0")
    names = b"RGB" if says == "names" and stored == "RGB" else b"\1\2\3"
    scan = jpeg.index(b"\xff\xda")
    edited = bytearray(jpeg)
    for index in range(3):
        edited[start + 10 + 3 * index] = edited[scan + 5 + 2 * index] = names[index]
    extra = {
        "Adobe": b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\0" if stored == "RGB" else b"\1"),
        "JFIF": b"\xff\xe0\x00\x10JFIF\0\1\1\0\0\1\0\1\0\0",
    }.get(says, b"")
    content = made_compressed(
        [jpeg[:2] + extra + bytes(edited[2:])], JPEGBaseline8Bit, 48, 64, PhotometricInterpretation=labelled
    )
    assert near(content)
    assert noticed(content, "colours are not those") == ((labelled == "RGB") != (stored == "RGB"))


def test_subsampled_jpeg_frames_are_ybr() -> None:
    jpeg = without_segments(encoded("jpeg8", COLOURS, level=98, subsampling="420"), 0xE0, 0xEE)
    assert near(made_compressed([jpeg], JPEGBaseline8Bit, 48, 64, PhotometricInterpretation="RGB"), tolerance=6)


@pytest.mark.parametrize("labelled", ["RGB", "YBR_FULL", "YBR_RCT", "YBR_ICT"])
@pytest.mark.parametrize("container", ["j2k", "jp2"])
def test_jpeg_2000_with_its_component_transform_is_rgb(labelled: str, container: str) -> None:
    frame = encoded("jpeg2k", COLOURS, codecformat=container, reversible=True, level=0, mct=True)
    content = made_compressed([frame], JPEG2000Lossless, 48, 64, PhotometricInterpretation=labelled)
    assert np.array_equal(decode(content).frames[0], COLOURS)
    plain = encoded("jpeg2k", ybr(), codecformat=container, reversible=True, level=0, mct=False)
    assert near(made_compressed([plain], JPEG2000Lossless, 48, 64, PhotometricInterpretation="YBR_FULL"))


def test_frames_without_loss_keep_their_colours() -> None:
    for syntax, frame in (
        (JPEGLSLossless, encoded("jpegls", COLOURS)),
        (JPEGLosslessSV1, encoded("jpeg8", COLOURS, lossless=True, colorspace="RGB", outcolorspace="RGB")),
    ):
        content = made_compressed([frame], syntax, 48, 64, PhotometricInterpretation="RGB")
        assert np.array_equal(decode(content).frames[0], COLOURS)


def packed_422(values: Any) -> bytes:
    pairs = np.concatenate([values[:, ::2, :1], values[:, 1::2, :1], values[:, ::2, 1:]], axis=-1)
    return np.ascontiguousarray(pairs).tobytes()


@pytest.mark.parametrize("labelled", ["YBR_FULL", "YBR_FULL_422"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("frames", [None, 1])
def test_native_chroma_is_read_as_the_length_says(labelled: str, packed: bool, frames: int | None) -> None:
    values = ybr()
    data = packed_422(values) if packed else values.tobytes()
    attributes: dict[str, Any] = {} if frames is None else {"NumberOfFrames": frames}
    content = made(values, PhotometricInterpretation=labelled, PixelData=data, **attributes)
    assert near(content, tolerance=6)
    assert noticed(content, "chroma") == (packed != (labelled == "YBR_FULL_422"))


def test_partial_range_is_widened() -> None:
    partial = ybr().astype(float) * [219 / 255, 224 / 255, 224 / 255] + [16, 16, 16]
    content = made(np.rint(partial).astype(np.uint8), PhotometricInterpretation="YBR_PARTIAL_422")
    assert near(content)


@pytest.mark.parametrize("labelled", [0, 1, None])
@pytest.mark.parametrize("by_plane", [False, True])
def test_planes_are_recognised(labelled: int | None, by_plane: bool) -> None:
    data = np.moveaxis(COLOURS, -1, 0) if by_plane else COLOURS
    content = made(COLOURS, PixelData=np.ascontiguousarray(data).tobytes(), PlanarConfiguration=labelled)
    assert np.array_equal(decode(content).frames[0], COLOURS)
    assert noticed(content, "Planar Configuration (0028,0006)") == (labelled != int(by_plane))


def test_wide_samples_are_narrowed_by_the_bits_that_they_have() -> None:
    for scale, stored in ((257, 16), (1, 16), (16, 16), (16, 12), (1, 8)):
        assert near(made(COLOURS.astype(np.uint16) * scale, **bits(stored)), tolerance=1), (scale, stored)


# --- Attributes that are missing or contradict each other


@pytest.mark.parametrize(
    ("attributes", "notice"),
    [
        ({"SamplesPerPixel": None}, "Samples per Pixel (0028,0002)"),
        ({"BitsAllocated": None}, "Bits Allocated (0028,0100)"),
        ({"PhotometricInterpretation": None}, "Photometric Interpretation (0028,0004)"),
        ({"PhotometricInterpretation": ""}, "Photometric Interpretation (0028,0004)"),
        ({"PixelRepresentation": None}, "Pixel Representation (0028,0103)"),
        ({"PlanarConfiguration": None}, "Planar Configuration (0028,0006)"),
        ({"BitsStored": 12}, "Bits Stored (0028,0101)"),
        ({"HighBit": 15}, "High Bit (0028,0102)"),
        ({"SamplesPerPixel": 1}, "Samples per Pixel (0028,0002)"),
        ({"PhotometricInterpretation": "MONOCHROME2"}, "Photometric Interpretation (0028,0004)"),
        ({"BitsStored": None, "HighBit": None}, ""),
    ],
)
def test_one_sensible_value_is_taken_for_what_is_missing(attributes: dict[str, Any], notice: str) -> None:
    content = made(COLOURS, NumberOfFrames=1, **attributes)
    assert np.array_equal(decode(content).frames[0], COLOURS)
    assert noticed(content, notice) or not notice


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (made(DARK, PhotometricInterpretation="RGB"), ("Photometric Interpretation", "Samples per Pixel")),
        (made(DARK, BitsAllocated=12, BitsStored=12, HighBit=11), ("Bits Allocated (0028,0100)",)),
        (made(DARK, Rows=None), ("Rows (0028,0010)",)),
        (made(DARK, SamplesPerPixel=2), ("Samples per Pixel (0028,0002)",)),
        (made(DARK, PhotometricInterpretation="HSV"), ("Photometric Interpretation (0028,0004)",)),
        (made(DARK, PixelData=None, PixelDataProviderURL="http://ZZTOP"), ("Pixel Data Provider URL (0028,7FE0)",)),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(content: bytes, names: tuple[str, ...]) -> None:
    description = refused(content)
    assert all(name in description for name in names)
    assert "damaged" not in description
    assert "ZZTOP" not in description
