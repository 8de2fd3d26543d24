"""DICOM in, RGB out: colours, frames, regions, and refusals that say why."""

import io
import logging
import subprocess
import sys
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, Sequence, dcmread
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import (
    UID,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.vision.anatomy import anatomy_terms
from echovlm_ray.vision.dicom import InvalidDicomError, decode_dicom
from echovlm_ray.vision.dicom.regions import image_box
from echovlm_ray.vision.images import DecodedImage, ImageLimits, decode_image_file
from tests.vision.dicom_samples import REAL, made, made_compressed, real, region

LIMITS = ImageLimits(max_image_bytes=64 * 1024**2, max_image_pixels=40_000_000, max_frames=8)
WHOLE = ImageLimits(max_image_bytes=64 * 1024**2, max_image_pixels=40_000_000, max_frames=8, crop_to_regions=False)
GREY = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)


def decode(content: bytes, limits: ImageLimits = WHOLE) -> DecodedImage:
    return decode_image_file(content, limits=limits, field="images[0].content")


def refused(content: bytes, limits: ImageLimits = WHOLE) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        decode(content, limits)
    assert caught.value.field == "images[0].content"
    return caught.value.description


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("limits", [LIMITS, WHOLE])
def test_every_real_file_is_accepted(name: str, limits: ImageLimits) -> None:
    image = decode(real(name), limits)
    header = dcmread(io.BytesIO(real(name)), stop_before_pixels=True)
    assert image.source_frames == int(header.get("NumberOfFrames", 1))
    assert len(image.frames) == (1 if image.source_frames == 1 else min(8, image.source_frames))
    for frame in image.frames:
        assert frame.dtype == np.uint8
        assert frame.shape == image.frames[0].shape
        assert frame.shape[2] == 3
        assert frame.std() > 1
    if limits is WHOLE:
        assert image.frames[0].shape[:2] == (header.Rows, header.Columns)


# Colours at places that were looked at by eye; every transform that can go wrong moves them far.
@pytest.mark.parametrize(
    ("name", "x", "y", "rgb"),
    [
        ("examples_ybr_color.dcm", 190, 20, (73, 143, 119)),
        ("color3d_jpeg_baseline.dcm", 378, 38, (81, 163, 125)),
        ("ExplVR_BigEnd.dcm", 40, 30, (255, 255, 0)),
        ("OBXXXX1A.dcm", 0, 1, (37, 62, 94)),
        ("US1_UNCR.dcm", 152, 204, (255, 224, 0)),
        ("gdcm-US-ALOKA-16.dcm", 69, 27, (0, 250, 0)),
        ("JPGLosslessP14SV1_1s_1f_8b.dcm", 5, 5, (0, 0, 0)),
    ],
)
def test_colours_are_right(name: str, x: int, y: int, rgb: tuple[int, int, int]) -> None:
    found = decode(real(name)).frames[0][y, x]
    assert np.abs(found.astype(int) - rgb).max() <= 8, tuple(found)


def test_the_same_picture_in_other_encodings_is_the_same() -> None:
    picture = decode(real("OBXXXX1A.dcm")).frames[0]
    for name in ("OBXXXX1A_expb.dcm", "OBXXXX1A_rle.dcm", "OBXXXX1A_2frame.dcm", "OBXXXX1A_expb_2frame.dcm"):
        assert np.array_equal(decode(real(name)).frames[0], picture), name
    assert np.array_equal(decode(real("US1_J2KR.dcm")).frames[0], decode(real("US1_UNCR.dcm")).frames[0])


def test_uniform_frames_of_a_cine_loop() -> None:
    pixels = np.repeat(np.arange(30, dtype=np.uint8), 64 * 64).reshape(30, 64, 64)
    image = decode(made(pixels, frames=30))
    assert [int(frame[0, 0, 0]) for frame in image.frames] == [0, 4, 8, 12, 17, 21, 25, 29]
    assert (image.frames_taken, image.source_frames, image.is_video) == (8, 30, True)


def test_odd_loops_show_the_last_frame_twice_and_one_frame_is_a_still() -> None:
    pixels = np.repeat(np.arange(3, dtype=np.uint8), 64 * 64).reshape(3, 64, 64)
    image = decode(made(pixels, frames=3))
    assert [int(frame[0, 0, 0]) for frame in image.frames] == [0, 1, 2, 2]
    assert image.frames_taken == 3
    still = decode(made(pixels[:1], frames=1))
    assert not still.is_video
    assert len(still.frames) == 1


def test_only_sampled_frames_are_decoded() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    good = buffer.getvalue() + b"\0" * (len(buffer.getvalue()) % 2)
    frames = [good, b"\xff\xd8 broken", good, good]
    content = made_compressed(frames, JPEGBaseline8Bit, 64, 64, PhotometricInterpretation="YBR_FULL_422")
    two = ImageLimits(max_image_bytes=1024**2, max_image_pixels=40_000_000, max_frames=2)
    assert len(decode(content, two).frames) == 2
    image = decode(content)
    assert (image.frames_taken, image.source_frames, len(image.frames)) == (3, 4, 4)
    assert image.notices == ("It has 4 frames, of which 1 cannot be decoded and are left out.",)


def test_ybr_is_converted_once_with_and_without_an_adobe_marker() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[...] = (200, 60, 30)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95, subsampling=0)
    plain = buffer.getvalue()
    adobe = plain[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01" + plain[2:]
    for codestream in (plain, adobe):
        codestream += b"\0" * (len(codestream) % 2)
        content = made_compressed([codestream], JPEGBaseline8Bit, 64, 64, PhotometricInterpretation="YBR_FULL")
        assert np.abs(decode(content).frames[0].astype(int) - picture).max() <= 4


def test_native_ybr_full_is_converted() -> None:
    ybr = np.array(Image.new("RGB", (64, 64), (200, 60, 30)).convert("YCbCr"))
    frame = decode(made(ybr, PhotometricInterpretation="YBR_FULL")).frames[0]
    assert np.abs(frame.astype(int) - (200, 60, 30)).max() <= 2


def test_planar_configuration_and_big_endian() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (64, 48, 3), dtype=np.uint8)
    planar = np.ascontiguousarray(np.moveaxis(picture, -1, 0))
    assert np.array_equal(decode(made(picture, PixelData=planar.tobytes(), PlanarConfiguration=1)).frames[0], picture)
    wide = rng.integers(0, 65536, (64, 48), dtype=np.uint16)
    little = decode(made(wide)).frames[0]
    big = dcmread(io.BytesIO(real("ExplVR_BigEnd.dcm")))
    del big.PlanarConfiguration
    big.Rows, big.Columns, big.SamplesPerPixel, big.PhotometricInterpretation = 64, 48, 1, "MONOCHROME2"
    big.BitsAllocated = big.BitsStored = 16
    big.HighBit = 15
    big.PixelData = wide.astype(">u2").tobytes()
    big["PixelData"].VR = "OW"
    buffer = io.BytesIO()
    big.save_as(buffer)
    assert np.array_equal(little, decode(buffer.getvalue()).frames[0])


def test_sixteen_bit_rgb_is_scaled() -> None:
    pixels = np.full((64, 64, 3), (65535, 32768, 0), np.uint16)
    assert decode(made(pixels)).frames[0][0, 0].tolist() == [255, 128, 0]


def test_sixteen_bit_greyscale_without_window_is_stretched() -> None:
    frame = decode(made(GREY)).frames[0]
    assert frame.min() == 0
    assert frame.max() == 255
    assert (np.diff(frame[..., 0].flatten().astype(int)) >= 0).all()


def test_windows_and_inversion() -> None:
    window: dict[str, Any] = {"WindowCenter": 2048, "WindowWidth": 1024}
    frame = decode(made(GREY, **window)).frames[0].reshape(-1, 3)
    assert frame[1535].tolist() == [0, 0, 0]
    assert frame[2560].tolist() == [255, 255, 255]
    assert abs(int(frame[2048][0]) - 128) <= 1
    inverted = decode(made(GREY, PhotometricInterpretation="MONOCHROME1", **window)).frames[0].reshape(-1, 3)
    assert np.array_equal(inverted, 255 - frame)
    sigmoid = decode(made(GREY, VOILUTFunction="SIGMOID", **window)).frames[0].reshape(-1, 3)
    assert abs(int(sigmoid[2048][0]) - 128) <= 1
    assert abs(int(sigmoid[2304][0]) - round(255 / (1 + np.exp(-1)))) <= 1
    exact = decode(made(GREY, VOILUTFunction="LINEAR_EXACT", **window)).frames[0].reshape(-1, 3)
    assert (int(exact[1536][0]), int(exact[2560][0])) == (0, 255)


def test_a_voi_lookup_table_is_applied() -> None:
    item = Dataset()
    item.LUTDescriptor = [4096, 0, 16]
    item.LUTData = (65535 - GREY.flatten() * 16).astype("<u2").tobytes()
    frame = decode(made(GREY, VOILUTSequence=Sequence([item]))).frames[0].reshape(-1, 3)
    assert frame[0].tolist() == [255, 255, 255]
    assert frame[4095].tolist() == [0, 0, 0]


def test_eight_bit_greyscale_stays_as_it_is() -> None:
    pixels = np.full((64, 64), 40, np.uint8)
    assert (decode(made(pixels)).frames[0] == 40).all()
    assert (decode(made(pixels, PhotometricInterpretation="MONOCHROME1")).frames[0] == 215).all()


def test_regions_are_clamped_to_the_image() -> None:
    assert decode(real("examples_ybr_color.dcm"), LIMITS).frames[0].shape == (240 - 31, 320 - 84, 3)
    assert decode(real("examples_palette.dcm"), LIMITS).frames[0].shape == (350 - 60, 800 - 120, 3)


def test_the_box_of_the_regions_lies_within_the_image() -> None:
    dataset = dcmread(io.BytesIO(real("examples_ybr_color.dcm")))
    assert image_box(dataset, 320, 240, []) == (84, 31, 320, 240)
    dataset.SequenceOfUltrasoundRegions = [region(-5, -7, 400, 99)]
    assert image_box(dataset, 320, 240, []) == (0, 0, 320, 100)


def test_the_crop_is_the_box_around_all_image_regions() -> None:
    pixels = np.zeros((200, 300), np.uint8)
    pixels[20:100, 10:110] = 7
    regions = [
        region(10, 20, 109, 99),
        region(150, 40, 249, 120, 3),
        region(0, 0, 299, 10, 5),
        region(0, 150, 299, 199, 4),
    ]
    frame = decode(made(pixels, SequenceOfUltrasoundRegions=regions), LIMITS).frames[0]
    assert frame.shape == (101, 240, 3)
    assert (frame[:80, :100] == 7).all()


@pytest.mark.parametrize(
    "regions",
    [
        [region(0, 0, 5, 5)],
        [region(400, 400, 500, 500)],
        [region(0, 0, 299, 20, 5)],
        [region(0, 0, 299, 33)],
        [],
    ],
)
def test_regions_that_leave_no_picture_are_not_believed(regions: list[Dataset]) -> None:
    pixels = np.zeros((600, 300), np.uint8)
    image = decode(made(pixels, SequenceOfUltrasoundRegions=regions), LIMITS)
    assert image.frames[0].shape == (600, 300, 3)
    if any(item.RegionSpatialFormat == 1 for item in regions):
        assert any("not cropped" in notice for notice in image.notices)


def test_anatomy_comes_from_coded_attributes_only() -> None:
    code = Dataset()
    code.CodeMeaning = "Liver structure"
    content = made(
        np.zeros((64, 64), np.uint8),
        BodyPartExamined="LIVER",
        AnatomicRegionSequence=[code],
        StudyDescription="ZZTOP^PATIENT liver",
        PatientName="ZZTOP^PATIENT",
    )
    assert decode(content).anatomy_terms == ("LIVER", "Liver structure")
    assert anatomy_terms(Dataset()) == ()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (made(GREY, PixelData=None), "sent without them"),
        (made(GREY, Rows=0), "Rows (0028,0010)"),
        (made(GREY)[:-2000], "less pixel data than one frame takes"),
        (made(GREY)[:200], "ends before its pixel data"),
        (b"\0" * 128 + b"DICM", "ends before its pixel data"),
        (made(GREY, PhotometricInterpretation="CMYK"), "Photometric Interpretation (0028,0004)"),
        (made(GREY, Rows=60000, Columns=60000), "Rows (0028,0010), Columns (0028,0011)"),
    ],
)
def test_refusals_say_why(content: bytes, reason: str) -> None:
    assert reason in refused(content)


def test_a_report_is_no_picture() -> None:
    content = made(GREY, PixelData=None, Rows=None, Columns=None, Modality="SR", PatientName="ZZTOP^PATIENT")
    description = refused(content)
    assert "send an image object" in description
    assert "ZZTOP" not in description


def test_compressed_data_of_an_unknown_kind_are_refused() -> None:
    content = made_compressed([b"\0" * 100], JPEGBaseline8Bit, 64, 64)
    for syntax in (JPEGBaseline8Bit, RLELossless, "1.2.3.4.5.6.7"):
        assert "no frame starts" in refused(_with_syntax(content, syntax))


def _with_syntax(content: bytes, transfer_syntax: str) -> bytes:
    dataset = dcmread(io.BytesIO(content))
    meta = dataset.file_meta
    del meta.FileMetaInformationGroupLength
    meta.TransferSyntaxUID = UID(transfer_syntax)
    buffer = DicomBytesIO()
    buffer.write(b"\0" * 128 + b"DICM")
    write_file_meta_info(buffer, meta, enforce_standard=True)
    return buffer.getvalue() + content[content.index(b"\x08\x00\x16\x00") :]


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
def test_frames_are_as_large_as_they_say_themselves(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (400, 300), (200, 60, 30)).save(buffer, kind, **({"no_jp2": True} if kind == "JPEG2000" else {}))
    syntax = JPEGBaseline8Bit if kind == "JPEG" else JPEG2000Lossless
    content = made_compressed([buffer.getvalue() + b"\0" * (len(buffer.getvalue()) % 2)], syntax, 64, 64)
    image = decode(content)
    assert image.frames[0].shape == (300, 400, 3)
    assert any("another size than its Rows (0028,0010)" in notice for notice in image.notices)
    tight = ImageLimits(max_image_bytes=10**6, max_image_pixels=400 * 300 - 1, max_frames=8)
    assert "400 × 300 pixels in 1 frames" in refused(content, tight)


def test_the_limit_counts_the_frames_that_are_taken() -> None:
    content = made(np.zeros((20, 64, 64), np.uint8), frames=20)
    fitting = ImageLimits(max_image_bytes=10**6, max_image_pixels=8 * 64 * 64, max_frames=8)
    assert len(decode(content, fitting).frames) == 8
    tight = ImageLimits(max_image_bytes=10**6, max_image_pixels=8 * 64 * 64 - 1, max_frames=8)
    assert "8 frames" in refused(content, tight)


SILENT = """
import sys
from echovlm_ray.vision.dicom import InvalidDicomError, decode_dicom
for content in sys.stdin.buffer.read().split(b"=====END====="):
    try:
        decode_dicom(content, max_pixels=10**7, max_frames=8, crop_to_regions=True)
    except InvalidDicomError as error:
        print(error)
"""


def test_nothing_of_a_file_reaches_the_log_or_an_error(caplog: pytest.LogCaptureFixture) -> None:
    secret = "ZZTOPPATIENT"
    files = [
        made(GREY, PatientName=secret, NumberOfFrames=3),
        made(GREY, BodyPartExamined=f"{secret}~{'x' * 40}", SpecificCharacterSet="ISO 2022 IR 87"),
        made(GREY, PatientName=secret)[:400],
        made(GREY).replace(b"MONOCHROME2 ", secret.encode()),
        made(GREY, StudyDate="19990101").replace(b"19990101", b"ZZTOPPAT"),
        made(GREY).replace(b"1.2.840.10008.1.2.1\0", b"1.2.ZZTOPPATIENT.1\0\0"),
        made(GREY, SpecificCharacterSet="ISO 2022 IR 87").replace(b"ISO 2022 IR 87", b"ZZTOPPATIENT 8"),
        made(GREY, PatientID=secret).replace(b"1.2.840.10008.5.1.4.1.1.6.1", b"1.2.ZZTOPPATIENT.5.1.4.1.16"),
    ]
    process = subprocess.run(
        [sys.executable, "-W", "always", "-c", SILENT],
        input=b"=====END=====".join(files),
        capture_output=True,
        check=True,
    )
    output = process.stdout + process.stderr
    assert b"ZZTOP" not in output
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        for content in files:
            with suppress(InvalidDicomError):
                decode_dicom(content, max_pixels=10**7, max_frames=8, crop_to_regions=True)
    assert secret not in caplog.text
