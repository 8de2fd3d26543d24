"""Ultrasound regions that are wrong neither move the crop nor switch it off without a word."""

from typing import Any

import numpy as np
import pytest
from pydicom import Dataset

from echovlm_ray.vision.dicom import decode_dicom
from tests.vision.dicom_samples import made, picture, region

PIXELS = picture(150, 200)
GOOD = region(10, 20, 109, 99)
GOOD_SHAPE = (80, 100, 3)


def decoded(*regions: Dataset, **attributes: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    attributes.setdefault("SequenceOfUltrasoundRegions", list(regions))
    found = decode_dicom(made(PIXELS, **attributes), max_pixels=10**6, max_frames=8, crop_to_regions=True)
    return found.frames[0].shape, found.notices


def unsigned(left: int, top: int, right: int, bottom: int) -> Dataset:
    return region(*(corner & 0xFFFFFFFF for corner in (left, top, right, bottom)))


def without(*keywords: str) -> Dataset:
    item = region(10, 20, 109, 99)
    for keyword in keywords:
        delattr(item, keyword)
    return item


BAD = [
    region(0, 0, 0, 0),
    region(300, 300, 400, 400),
    unsigned(-50, -40, -10, -20),
    region(0, 0, 5, 5),
    region(0, 0, 1, 149),
    region(120, 110, 0, 0),
    unsigned(120, 110, -1, -1),
    unsigned(120, 110, 150, -1),
    without("RegionLocationMinX0"),
    without("RegionLocationMaxY1"),
    without("RegionLocationMinX0", "RegionLocationMinY0", "RegionLocationMaxX1", "RegionLocationMaxY1"),
]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_region_beside_a_good_one_is_left_out(bad: Dataset, first: bool) -> None:
    shape, notices = decoded(*((bad, GOOD) if first else (GOOD, bad)))
    assert shape == GOOD_SHAPE
    assert any("1 image regions without a location" in text for text in notices)


@pytest.mark.parametrize("bad", BAD)
def test_bad_regions_alone_leave_the_whole_picture_and_say_so(bad: Dataset) -> None:
    shape, notices = decoded(bad, bad)
    assert shape == (150, 200, 3)
    assert any("not cropped" in text for text in notices)


@pytest.mark.parametrize(
    ("item", "shape"),
    [
        (region(109, 99, 10, 20), GOOD_SHAPE),
        (region(109, 20, 10, 99), GOOD_SHAPE),
        (unsigned(-1, 20, 109, 99), (80, 110, 3)),
        (unsigned(-1, -1, 109, 99), (100, 110, 3)),
        (unsigned(-20, -7, 400, 99), (100, 200, 3)),
        (region(10, 20, 2000, 3000), (130, 190, 3)),
    ],
)
def test_corners_are_put_right_where_that_gives_a_box(item: Dataset, shape: tuple[int, ...]) -> None:
    found, notices = decoded(item)
    assert found == shape
    assert any("reversed or outside the picture" in text for text in notices)


@pytest.mark.parametrize("item", [GOOD, region(0, 0, 199, 149), region(0, 0, 200, 150)])
def test_sound_regions_have_no_notice(item: Dataset) -> None:
    assert decoded(item)[1] == ()


def test_other_formats_are_no_image_and_a_missing_one_is() -> None:
    assert decoded(GOOD, region(0, 0, 199, 10, 5)) == (GOOD_SHAPE, ())
    assert decoded(without("RegionSpatialFormat"))[0] == GOOD_SHAPE


@pytest.mark.parametrize("spatial_format", [0, 4, 5])
def test_regions_none_of_which_is_an_image_leave_the_whole_picture_and_say_so(spatial_format: int) -> None:
    shape, notices = decoded(region(10, 20, 109, 99, spatial_format))
    assert shape == (150, 200, 3)
    assert any("without an image region" in text and "not cropped" in text for text in notices)


def test_an_unknown_format_may_be_an_image() -> None:
    assert decoded(region(10, 20, 109, 99, 99)) == (GOOD_SHAPE, ())


def test_an_empty_sequence_is_said_and_a_missing_one_is_not() -> None:
    shape, notices = decoded()
    assert shape == (150, 200, 3)
    assert any("not cropped" in text for text in notices)
    plain = decode_dicom(made(PIXELS), max_pixels=10**6, max_frames=8, crop_to_regions=True)
    assert (plain.frames[0].shape, plain.notices) == ((150, 200, 3), ())


def test_the_crop_follows_the_size_of_the_frames() -> None:
    frames = np.stack([PIXELS] * 3)
    found = decode_dicom(
        made(frames, frames=3, SequenceOfUltrasoundRegions=[GOOD]),
        max_pixels=10**6,
        max_frames=8,
        crop_to_regions=True,
    )
    assert all(np.array_equal(frame[..., 0], PIXELS[20:100, 10:110]) for frame in found.frames)
