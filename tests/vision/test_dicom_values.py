"""Values and colours whose attributes say something else than the pixel data do, and windows that show nothing."""

from typing import Any

import numpy as np
import pytest
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless

from tests.vision.dicom_pixels import (
    COLOURS,
    WINDOW_12,
    bits,
    decode,
    grey,
    in_window,
    item,
    near,
    noticed,
    ybr,
)
from tests.vision.dicom_samples import encoded, made, made_compressed, picture

SMOOTH = picture(48, 64)
DARK = SMOOTH // 5
# Eight bits of twelve, so that low bits are no evidence.
TWELVE = SMOOTH.astype(np.uint16) << 4
SIGNED = TWELVE.astype(np.int16) - 2048
SIGNED_WINDOW: dict[str, Any] = {"WindowCenter": 0, "WindowWidth": 4096, "PixelRepresentation": 1}


@pytest.mark.parametrize(
    ("values", "attributes", "notice"),
    [
        (TWELVE, bits(12, high=15) | WINDOW_12, "lower bits"),
        (TWELVE, bits(12, high=13) | WINDOW_12, "lower bits"),
        (SIGNED, bits(12, high=15) | SIGNED_WINDOW, "lower bits"),
        (SIGNED + 3, bits(12, high=15) | SIGNED_WINDOW, "lower bits"),
        (SIGNED.view(np.uint16) & 0xFFF, bits(12, high=15) | SIGNED_WINDOW, "lower bits"),
        (TWELVE << 4, bits(12) | WINDOW_12, "higher bits"),
        (TWELVE << 4, bits(12, high=15) | WINDOW_12, ""),
        (SIGNED << 4, bits(12, high=15) | SIGNED_WINDOW, ""),
    ],
)
def test_the_values_tell_which_bits_are_stored(values: Any, attributes: dict[str, Any], notice: str) -> None:
    content = made(values, **attributes)
    assert np.abs(grey(content) - in_window(TWELVE)).max() <= 1
    assert noticed(content, notice) == bool(notice)


def test_an_overlay_in_the_upper_bits_does_not_shift_the_values() -> None:
    overlay = np.zeros((48, 64), np.uint16)
    overlay[::5, ::7] = 0x8000
    content = made(TWELVE | overlay, **bits(12), **WINDOW_12)
    assert np.abs(grey(content) - in_window(TWELVE)).max() <= 1
    assert decode(content).notices == ()


def test_a_wrong_sign_is_noticed_at_any_number_of_bits() -> None:
    for stored in (12, 16):
        content = made(TWELVE << (stored - 12), PixelRepresentation=1, **bits(stored))
        shown = np.rint((SMOOTH - float(SMOOTH.min())) / np.ptp(SMOOTH) * 255)
        assert np.abs(grey(content) - shown).max() <= 1
        assert noticed(content, "Pixel Representation (0028,0103)")


@pytest.mark.parametrize(
    ("values", "attributes"),
    [
        (DARK.astype(np.uint16), bits(8) | {"PixelRepresentation": 1}),
        (DARK, {"PixelRepresentation": 1}),
        ((DARK.astype(np.int16) - 128).astype(np.int8), {"PixelRepresentation": 1}),
        ((DARK.astype(np.int16) - 128).astype(np.int8), {"PixelRepresentation": 1, "RescaleIntercept": 128}),
        (255 - DARK, {"RescaleSlope": -1, "RescaleIntercept": 255}),
    ],
)
def test_eight_bits_with_a_sign_or_a_negative_slope_are_not_stretched(values: Any, attributes: dict[str, Any]) -> None:
    assert np.array_equal(grey(made(values, **attributes)), DARK)


@pytest.mark.parametrize("widened", [1, 16, 256, 257])
def test_modality_tables_do_not_brighten_eight_bits(widened: int) -> None:
    table = item(
        LUTDescriptor=[256, 0, 12 if widened == 16 else 16],
        LUTData=(np.arange(256) * widened).astype("<u2").tobytes(),
        ModalityLUTType="US",
    )
    assert np.abs(grey(made(DARK, ModalityLUTSequence=[table])) - DARK).max() <= 1


@pytest.mark.parametrize("wide", [0xFFFF, 0x8000, 63536])
def test_padding_of_more_bits_than_are_stored_is_padding(wide: int) -> None:
    values = TWELVE + 90
    values[:8] = wide
    shown = np.rint((values[8:] - float(values[8:].min())) / np.ptp(values[8:]) * 255)
    found = grey(made(values, PixelPaddingValue=wide, **bits(12)))
    assert not found[:8].any()
    assert np.abs(found[8:] - shown).max() <= 1
    as_signed = made(values, PixelPaddingValue=wide, **bits(12))
    as_signed = as_signed.replace(b"\x28\x00\x20\x01US", b"\x28\x00\x20\x01SS")
    assert np.array_equal(grey(as_signed), found)


def test_padding_that_leaves_no_picture_is_left_out() -> None:
    content = made(SMOOTH, PixelPaddingValue=0, PixelPaddingRangeLimit=255)
    assert np.array_equal(grey(content), SMOOTH)
    assert noticed(content, "Pixel Padding Range Limit (0028,0121)")


@pytest.mark.parametrize(("centre", "width"), [(0, 1), (100_000, 100), (-500, 20)])
def test_a_window_that_shows_nothing_is_left_out(centre: int, width: int) -> None:
    content = made(DARK, WindowCenter=centre, WindowWidth=width)
    assert np.array_equal(grey(content), DARK)
    assert noticed(content, "a window in which its picture is of one shade")
    twelve = made(TWELVE + 5, WindowCenter=centre, WindowWidth=width, **bits(12))
    assert np.ptp(grey(twelve)) == 255
    assert decode(made(np.full((48, 64), 7, np.uint8), WindowCenter=100, WindowWidth=3)).notices == ()


def test_dark_palettes_of_widened_bytes_stay_dark() -> None:
    for widened in (256, 257):
        tables: dict[str, Any] = {
            f"{name}PaletteColorLookupTable{part}": value
            for name in ("Red", "Green", "Blue")
            for part, value in (
                ("Descriptor", [256, 0, 16]),
                ("Data", (np.arange(256) // 20 * widened).astype("<u2").tobytes()),
            )
        }
        content = made(picture(48, 64), PhotometricInterpretation="PALETTE COLOR", **tables)
        assert np.array_equal(grey(content), picture(48, 64) // 20)


@pytest.mark.parametrize("labelled", ["RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT"])
@pytest.mark.parametrize("stored", ["RGB", "YBR"])
@pytest.mark.parametrize("kind", ["native", "JPEG-LS", "JPEG 2000"])
def test_frames_that_do_not_say_their_colours_are_read_as_the_far_greyer_ones(
    labelled: str, stored: str, kind: str
) -> None:
    values = COLOURS if stored == "RGB" else ybr()
    if kind == "native":
        content = made(values, PhotometricInterpretation=labelled)
    elif kind == "JPEG-LS":
        frame = encoded("jpegls", values)
        content = made_compressed([frame], JPEGLSLossless, 48, 64, PhotometricInterpretation=labelled)
    else:
        frame = encoded("jpeg2k", values, codecformat="j2k", reversible=True, level=0, mct=False)
        content = made_compressed([frame], JPEG2000Lossless, 48, 64, PhotometricInterpretation=labelled)
    assert near(content)
    is_ybr = labelled.startswith("YBR_FULL")
    assert noticed(content, "colours are not those") == (is_ybr != (stored == "YBR"))


@pytest.mark.parametrize("colour", [(200, 128, 128), (0, 0, 0), (255, 255, 255), (20, 60, 220)])
def test_a_picture_of_one_colour_is_as_it_is_labelled(colour: tuple[int, int, int]) -> None:
    values = np.full((48, 64, 3), colour, np.uint8)
    assert np.array_equal(decode(made(values)).frames[0], values)


@pytest.mark.parametrize("missing", ["SamplesPerPixel", "BitsAllocated"])
def test_one_colour_picture_is_found_by_its_length(missing: str) -> None:
    attributes: dict[str, Any] = {"SamplesPerPixel": None, "PhotometricInterpretation": None, missing: None}
    found = decode(made(COLOURS, **attributes))
    assert found.source_frames == 1
    assert np.array_equal(found.frames[0], COLOURS)
    assert decode(made(SMOOTH, **attributes)).source_frames == 1
