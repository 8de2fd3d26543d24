"""The DICOM files of tests/cases: each is the right picture or refused for the right reason, and says what was done."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.vision.images import DecodedImage, ImageLimits, decode_image_file

CASES = Path(__file__).parents[1] / "cases"
ALL: list[dict[str, Any]] = json.loads((CASES / "cases.json").read_text(encoding="utf-8"))
STILLS_AND_LOOPS = [case for case in ALL if case["file"].endswith(".dcm") and not case["file"].startswith("video_")]
# Of these the case names no picture: how many frames are taken, of how many, and what the notice says.
WITH_NOTICE = {
    "cine_one_bad_frame.dcm": (3, 4, "of which 1 cannot be decoded"),
    "mf_nof_missing.dcm": (5, 5, "no Number of Frames (0028,0008)"),
    "mfj_cut_in_last_frame.dcm": (4, 5, "cut off within its pixel data"),
    "mfj_nof_bigger.dcm": (5, 5, "Number of Frames (0028,0008) that is not that of its pixel data"),
    "mfj_nof_missing_bot.dcm": (5, 5, "no Number of Frames (0028,0008)"),
    "pi_missing_mono.dcm": (1, 1, "taken as MONOCHROME2"),
}
REFUSED = {"rgb_spp1.dcm": ("Photometric Interpretation (0028,0004)", "Samples per Pixel (0028,0002)")}
# The picture of this case has another size than the file; what is right is the whole picture of the file.
WHOLE_PICTURE = "reg_missing_minx.dcm"


def decode(name: str, *, crop: bool) -> DecodedImage:
    limits = ImageLimits(max_image_bytes=64 * 1024**2, max_image_pixels=40_000_000, max_frames=8, crop_to_regions=crop)
    return decode_image_file((CASES / name).read_bytes(), limits=limits, field="images[0].content")


@pytest.mark.parametrize("case", STILLS_AND_LOOPS, ids=lambda case: str(case["file"]))
def test_a_case_is_taken_or_refused_as_is_right(case: dict[str, Any]) -> None:
    name = case["file"]
    if name in REFUSED:
        with pytest.raises(InvalidRequestError) as caught:
            decode(name, crop=case["crop"])
        assert all(attribute in caught.value.description for attribute in REFUSED[name])
        assert "damaged" not in caught.value.description
        return
    image = decode(name, crop=case["crop"])
    if name in WITH_NOTICE:
        taken, source, notice = WITH_NOTICE[name]
        assert (image.frames_taken, image.source_frames) == (taken, source)
        assert any(notice in text for text in image.notices), image.notices
        return
    right = decode(name, crop=False).frames if name == WHOLE_PICTURE else np.load(CASES / case["picture"])["frames"]
    assert len(image.frames) == len(right)
    for frame, expected in zip(image.frames, right, strict=True):
        assert frame.shape == expected.shape
        assert np.abs(frame.astype(int) - expected).mean() <= case["tolerance"]


def test_every_dicom_case_is_covered() -> None:
    for case in STILLS_AND_LOOPS:
        assert case.get("picture") or case["file"] in WITH_NOTICE or case["file"] in REFUSED, case["file"]


@pytest.mark.parametrize(
    ("name", "notice"),
    [
        ("reg_missing_minx.dcm", "not cropped"),
        ("reg_minus_one_UL.dcm", "outside the picture"),
        ("reg_zero_and_good.dcm", "1 image regions without a location"),
        ("window_zero_width.dcm", "window without width"),
        ("missing_PixelRepresentation.dcm", "no Pixel Representation (0028,0103)"),
        ("rgb_planar_missing.dcm", "no Planar Configuration (0028,0006)"),
        ("native_ts_but_jpeg_pixels.dcm", "against its Transfer Syntax UID (0002,0010)"),
        ("no_meta_explicit.dcm", "no File Meta Information"),
        ("no_preamble_with_meta.dcm", "no preamble"),
        ("ts_missing_explicit.dcm", "no Transfer Syntax UID (0002,0010)"),
        ("jpg_truncated_last_bytes.dcm", "without its end marker"),
        ("jpg_bigger_than_header.dcm", "rows or columns more than its attributes say"),
        ("jpg_grey_sof1_header3.dcm", "against its Samples per Pixel (0028,0002)"),
        ("jpg_nojfif_ybr_labelled_rgb.dcm", "colours are not those"),
        ("j2k_mct_labelled_ybr_full.dcm", "colours are not those"),
        ("pal16_label_8bit_values.dcm", "palettes of other bits"),
        ("voilut_16bit_label_8bit_values.dcm", "VOI LUT Sequence (0028,3010) of other bits"),
        ("ybr_full_422_label_but_444_native.dcm", "for every pixel"),
        ("mfj_bot_all_zero.dcm", "offset table"),
        ("mfj_no_delimiter.dcm", "no Sequence Delimitation Item"),
        ("delimiter_missing_still.dcm", "no Sequence Delimitation Item"),
    ],
)
def test_departures_from_what_is_written_are_notices(name: str, notice: str) -> None:
    case = next(case for case in ALL if case["file"] == name)
    assert any(notice in text for text in decode(name, crop=case["crop"]).notices)


@pytest.mark.parametrize("name", ["g8in16_nowindow.dcm", "g8_dark_rescale_1_0.dcm", "g16_padding.dcm", "deflated.dcm"])
def test_what_is_as_written_has_no_notice(name: str) -> None:
    assert decode(name, crop=False).notices == ()
