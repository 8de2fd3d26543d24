"""Videos inside DICOM."""

import io
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, JPEGBaseline8Bit, RLELossless, UltrasoundMultiFrameImageStorage, generate_uid

from echovlm_ray.vision.images import ImageLimits
from echovlm_ray.vision.sampling import sample_frames
from tests.vision.video_samples import FRAMES, H264_OPTIONS, HEIGHT, KINDS, WIDTH, decode, made, numbers, refused

MPEG2, H264, HEVC = "1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.102", "1.2.840.10008.1.2.4.107"


def dicom(fragments: list[bytes], syntax: str, frames: int | None = FRAMES, **attributes: Any) -> bytes:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = UltrasoundMultiFrameImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = HEIGHT, WIDTH, 3
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PhotometricInterpretation = "YBR_PARTIAL_420"
    if frames is not None:
        dataset.NumberOfFrames = frames
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.PixelData = encapsulate(fragments, has_bot=False)
    dataset["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def pieces(content: bytes, size: int) -> list[bytes]:
    content += bytes(len(content) % 2)
    return [content[at : at + size] for at in range(0, len(content), size)]


@pytest.mark.parametrize("size", [1 << 30, 1000])
@pytest.mark.parametrize(
    ("name", "syntax"),
    [
        ("H.264", H264), ("mp4", H264), ("transport stream", H264), ("HEVC", HEVC), ("mp4 of HEVC", HEVC),
        ("MPEG-2", MPEG2), ("program stream", MPEG2), ("program stream", MPEG2 + ".1"),
        # The stream itself says what it is.
        ("H.264", MPEG2), ("MPEG-2", HEVC),
    ],
)  # fmt: skip
def test_videos_in_dicom(name: str, syntax: str, size: int) -> None:
    stream = made(*KINDS[name][1], **KINDS[name][2])
    image = decode(dicom(pieces(stream, size), syntax))
    assert numbers(image) == list(sample_frames(FRAMES, 8))
    assert (image.source_frames, image.notices) == (FRAMES, ())


def test_a_video_under_the_label_of_stills_is_a_video() -> None:
    stream = made(*KINDS["H.264"][1], **KINDS["H.264"][2])
    for syntax in (JPEGBaseline8Bit, RLELossless):
        image = decode(dicom(pieces(stream, 1000), syntax))
        assert numbers(image) == list(sample_frames(FRAMES, 8))
    assert "are a video" in decode(dicom(pieces(stream, 1000), JPEGBaseline8Bit)).notices[0]


def test_stills_under_the_label_of_a_video_are_frames() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (200, 60, 30)).save(buffer, "JPEG")
    image = decode(dicom([buffer.getvalue()] * 4, H264, frames=4))
    assert (len(image.frames), image.source_frames) == (4, 4)
    assert any("are no video" in notice for notice in image.notices)


def region(left: int, top: int, right: int, bottom: int) -> Dataset:
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType = 1, 1
    item.RegionLocationMinX0, item.RegionLocationMinY0 = left, top
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = right, bottom
    return item


def test_video_in_dicom_is_cropped_to_its_regions() -> None:
    stream = made("h264", "libx264", ratio=Fraction(2), **H264_OPTIONS)
    content = dicom(pieces(stream, 1 << 30), H264, SequenceOfUltrasoundRegions=[region(10, 20, 109, 99)])
    whole = decode(content, ImageLimits(16 * 1024**2, 1_000_000, 8, crop_to_regions=False))
    cropped = decode(content)
    assert all(
        np.array_equal(part, frame[20:100, 10:110]) for part, frame in zip(cropped.frames, whole.frames, strict=True)
    )


def test_what_dicom_says_wrongly_of_its_video_is_a_notice() -> None:
    stream = pieces(made("h264", "libx264", **H264_OPTIONS), 1 << 30)
    for stated in (None, 1, 9999):
        image = decode(dicom(stream, H264, frames=stated))
        assert image.source_frames == FRAMES
        assert "NumberOfFrames" in image.notices[0]
    image = decode(dicom(stream, H264, Rows=200))
    assert "Rows and Columns" in image.notices[0]


def test_a_dicom_video_that_is_no_video_is_refused() -> None:
    assert "convert it to MP4" in refused(dicom([bytes(1000)], H264))
    assert "cut off before the first frame" in refused(dicom([], H264))
    dataset = dcmread(io.BytesIO(dicom([bytes(1000)], MPEG2)))
    del dataset.PixelData
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    assert "was sent without them" in refused(buffer.getvalue())
