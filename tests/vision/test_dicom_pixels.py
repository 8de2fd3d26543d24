"""Stored values to grey: which bits count, padding, windows and lookup tables, against what is right."""

from typing import Any

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.uid import JPEGLSLossless

from echovlm_ray.vision.dicom.lookup import real_bits
from tests.vision.dicom_pixels import WINDOW_12, bits, decode, grey, in_window, item, noticed, refused
from tests.vision.dicom_samples import encoded, made, made_compressed, picture

DARK = picture(48, 64) // 5
TWELVE = (picture(48, 64).astype(np.uint16) << 4) | 3


# --- What stays as it is


@pytest.mark.parametrize(
    "content",
    [
        made(DARK),
        made(DARK, RescaleSlope=1, RescaleIntercept=0),
        made(DARK, RescaleSlope=2.5, RescaleIntercept=-30),
        made(DARK, WindowCenter=0, WindowWidth=0),
        made(DARK, WindowCenter=[], WindowWidth=[]),
        made(DARK, BitsStored=None, HighBit=None, PixelRepresentation=None),
        made(DARK.astype(np.uint16), **bits(8)),
        made(DARK.astype(np.uint16), **bits(8), RescaleSlope=1, RescaleIntercept=0),
        made(DARK.astype(np.uint16) << 8, **bits(8, high=15)),
        made(DARK.astype(np.uint32), **bits(8, allocated=32)),
        made(DARK, BitsAllocated=16, BitsStored=16, HighBit=15),
    ],
)
def test_eight_stored_bits_stay_as_they_are(content: bytes) -> None:
    assert np.array_equal(grey(content), DARK)


def test_one_bit_and_four_bits_use_the_whole_range() -> None:
    mask = picture(40, 48) > 120
    packed = np.packbits(mask.flatten(), bitorder="little").tobytes()
    content = made(mask.astype(np.uint8), BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=packed)
    assert np.array_equal(grey(content), mask * 255)
    assert np.array_equal(grey(made(DARK & 15, **bits(4, allocated=8))), (DARK & 15) * 17)


def test_more_bits_are_stretched_over_all_frames_alike() -> None:
    frames = np.stack([TWELVE // 2, TWELVE])
    low, high = int(frames.min()), int(frames.max())
    found = decode(made(frames, frames=2, **bits(12)))
    for frame, values in zip(found.frames, frames, strict=True):
        assert np.abs(frame[..., 0] - np.rint((values - float(low)) / (high - low) * 255)).max() == 0


# --- Which bits count


def test_high_bits_and_shifts_are_believed_where_the_data_fit_them() -> None:
    expected = in_window(TWELVE)
    shifted = made(TWELVE << 4, **bits(12, high=15), **WINDOW_12)
    assert np.abs(grey(shifted) - expected).max() <= 1
    assert decode(shifted).notices == ()
    not_shifted = made(TWELVE, **bits(12, high=15), **WINDOW_12)
    assert np.abs(grey(not_shifted) - expected).max() <= 1
    assert noticed(not_shifted, "High Bit (0028,0102)")
    contradicting = made(TWELVE, **bits(16, high=11), **WINDOW_12)
    assert np.abs(grey(contradicting) - expected).max() <= 1
    assert noticed(contradicting, "High Bit (0028,0102) that does not fit Bits Stored (0028,0101)")


def test_overlays_in_unused_bits_are_masked_and_missing_bits_are_found() -> None:
    overlay = np.zeros((48, 64), np.uint16)
    overlay[::5, ::7] = 0xF000
    content = made(TWELVE | overlay, **bits(12), **WINDOW_12)
    assert np.abs(grey(content) - in_window(TWELVE)).max() <= 1
    wide = made(TWELVE << 2, **bits(12), WindowCenter=8192, WindowWidth=16384)
    assert np.abs(grey(wide) - in_window(TWELVE)).max() <= 1
    assert noticed(wide, "more bits than its Bits Stored (0028,0101)")


def test_signed_values_are_signed_and_a_wrong_sign_is_noticed() -> None:
    signed = TWELVE.astype(np.int16) - 2048
    expected = in_window(TWELVE)
    window: dict[str, Any] = {"WindowCenter": 0, "WindowWidth": 4096}
    assert np.abs(grey(made(signed, PixelRepresentation=1, **bits(16), **window)) - expected).max() <= 1
    twelve = made(signed.astype(np.uint16) & 0xFFF, PixelRepresentation=1, **bits(12), **window)
    assert np.abs(grey(twelve) - expected).max() <= 1
    extended = made(signed, PixelRepresentation=1, **bits(12), **window)
    assert np.abs(grey(extended) - expected).max() <= 1
    wrong = made(picture(48, 64), PixelRepresentation=1)
    assert np.array_equal(grey(wrong), picture(48, 64))
    assert noticed(wrong, "Pixel Representation (0028,0103)")


def test_codestreams_with_fewer_bits_than_the_attributes_say() -> None:
    attributes = {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "PlanarConfiguration": None}
    frame = encoded("jpegls", TWELVE)
    for stored in (12, 16, 10, None):
        content = made_compressed(
            [frame],
            JPEGLSLossless,
            48,
            64,
            **attributes,
            BitsAllocated=16,
            BitsStored=stored,
            HighBit=None,
            **WINDOW_12,
        )
        assert np.abs(grey(content) - in_window(TWELVE)).max() <= 1


def test_float_pixel_data() -> None:
    values = (picture(48, 64) / 250).astype(np.float32)
    values[0, 0] = np.nan
    content = made(
        picture(48, 64),
        PixelData=None,
        FloatPixelData=values.tobytes(),
        BitsAllocated=32,
        BitsStored=None,
        HighBit=None,
    )
    found = grey(content)
    assert np.abs(found - np.rint(values.astype(float).clip(0, 1) * 255))[1:].max() <= 1
    assert found[0, 0] == 0


# --- Padding


@pytest.mark.parametrize("window", [{}, {"WindowCenter": 0, "WindowWidth": 4096}])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_no_part_of_the_stretch(window: dict[str, Any], photometric: str) -> None:
    values = TWELVE.astype(np.int16) - 2048
    values[:10], values[-5:] = -32768, -32760
    attributes = {"PixelRepresentation": 1, "PhotometricInterpretation": photometric, **bits(16), **window}
    found = grey(made(values, PixelPaddingValue=-32768, PixelPaddingRangeLimit=-32760, **attributes))
    assert not found[:10].any()
    assert not found[-5:].any()
    inner = values[10:-5]
    low, high = (-2048, 2047) if window else (inner.min(), inner.max())
    expected = np.rint((inner - float(low)) / (int(high) - int(low)) * 255)
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    assert np.abs(found[10:-5] - expected).max() <= 1


def test_a_picture_of_nothing_but_padding_is_black() -> None:
    assert not grey(made(np.full((48, 64), 700, np.uint16), PixelPaddingValue=700)).any()


# --- Windows, rescales and inversion


def test_the_first_window_with_a_width_is_taken() -> None:
    several = made(TWELVE, **bits(12), WindowCenter=[2048, 100], WindowWidth=[4096, 10])
    assert np.abs(grey(several) - in_window(TWELVE)).max() <= 1
    first_empty = made(TWELVE, **bits(12), WindowCenter=[0, 2048], WindowWidth=[0, 4096])
    assert np.abs(grey(first_empty) - in_window(TWELVE)).max() <= 1


def test_windows_and_rescales_of_functional_groups() -> None:
    frames = np.stack([TWELVE, TWELVE])
    shared = item(
        PixelValueTransformationSequence=[item(RescaleSlope=2, RescaleIntercept=100, RescaleType="US")],
        FrameVOILUTSequence=[item(WindowCenter=4196, WindowWidth=8192)],
    )
    found = decode(made(frames, frames=2, **bits(12), SharedFunctionalGroupsSequence=[shared]))
    assert np.abs(found.frames[1][..., 0] - in_window(TWELVE)).max() <= 1
    by_frame = [
        item(FrameVOILUTSequence=[item(WindowCenter=2048 * scale, WindowWidth=4096 * scale)]) for scale in (1, 2)
    ]
    found = decode(made(frames, frames=2, **bits(12), PerFrameFunctionalGroupsSequence=by_frame))
    assert np.abs(found.frames[0][..., 0] - in_window(TWELVE)).max() <= 1
    assert np.abs(found.frames[1][..., 0] - in_window(TWELVE / 2)).max() <= 1


def test_negative_slopes_and_inversions() -> None:
    upright = grey(made(TWELVE, **bits(12), **WINDOW_12))
    assert np.array_equal(grey(made(TWELVE, **bits(12), **WINDOW_12, PresentationLUTShape="INVERSE")), 255 - upright)
    both = made(
        TWELVE, **bits(12), **WINDOW_12, PresentationLUTShape="INVERSE", PhotometricInterpretation="MONOCHROME1"
    )
    assert np.array_equal(grey(both), 255 - upright)
    negative = made(TWELVE, **bits(12), RescaleSlope=-1, RescaleIntercept=4095, **WINDOW_12)
    assert np.abs(grey(negative) - (255 - upright)).max() <= 1
    no_slope = made(TWELVE, **bits(12), RescaleSlope=0, RescaleIntercept=0, **WINDOW_12)
    assert np.array_equal(grey(no_slope), upright)
    assert noticed(no_slope, "Rescale Slope (0028,1053)")


# --- Lookup tables


@pytest.mark.parametrize(
    ("largest", "stated", "bits_found"),
    [
        (65535, 16, 16),
        (255, 16, 8),
        (1023, 16, 10),
        (4095, 16, 12),
        (4096, 16, 16),
        (16383, 16, 14),
        (32767, 16, 16),
        (16383, 8, 14),
        (1023, 12, 10),
        (255, 8, 8),
        (256, 8, 10),
        (65535, 8, 16),
        (255, 12, 8),
        (256, 12, 12),
        (4095, 12, 12),
        (5000, 12, 16),
        (100, 8, 8),
    ],
)
def test_entries_say_how_many_bits_they_have(largest: int, stated: int, bits_found: int) -> None:
    assert real_bits(largest, stated) == bits_found


CURVE = np.rint(255 * (np.arange(256) / 255) ** 0.5).astype(np.uint16)
SQUARE_ROOT = CURVE[picture(48, 64)].astype(int)


@pytest.mark.parametrize("written_bits", [8, 12, 16])
@pytest.mark.parametrize("real", [8, 12, 16])
@pytest.mark.parametrize("vr", ["OW", "US", "SS"])
def test_voi_tables_of_any_bits_and_type(written_bits: int, real: int, vr: str) -> None:
    table = CURVE.astype(np.uint32) * ((1 << real) - 1) // 255
    lut = Dataset()
    lut.add_new("LUTDescriptor", "US", [256, 0, written_bits])
    if vr == "SS":
        lut.add_new("LUTData", "SS", table.astype(np.uint16).view(np.int16).tolist())
    else:
        lut.add_new("LUTData", vr, table.astype("<u2").tobytes() if vr == "OW" else table.tolist())
    found = grey(made(picture(48, 64), VOILUTSequence=[lut]))
    assert np.abs(found - SQUARE_ROOT).max() <= 1
    is_right = written_bits == real
    assert noticed(made(picture(48, 64), VOILUTSequence=[lut]), "VOI LUT Sequence") != is_right


def test_tables_of_bytes_of_all_values_and_of_negative_ones() -> None:
    packed = Dataset()
    packed.add_new("LUTDescriptor", "US", [256, 0, 8])
    packed.add_new("LUTData", "OW", CURVE.astype(np.uint8).tobytes())
    assert np.array_equal(grey(made(picture(48, 64), VOILUTSequence=[packed])), SQUARE_ROOT)
    whole = Dataset()
    whole.add_new("LUTDescriptor", "US", [0, 0, 16])
    whole.add_new("LUTData", "OW", np.arange(65535, -1, -1).astype("<u2").tobytes())
    wide = picture(48, 64).astype(np.uint16) * 257
    assert np.array_equal(grey(made(wide, VOILUTSequence=[whole])), 255 - picture(48, 64).astype(int))
    below = Dataset()
    below.add_new("LUTDescriptor", "SS", [256, -128, 8])
    below.add_new("LUTData", "OW", CURVE.astype("<u2").tobytes())
    signed = picture(48, 64).astype(np.int16) - 128
    content = made(signed, PixelRepresentation=1, **bits(16), VOILUTSequence=[below])
    assert np.array_equal(grey(content), SQUARE_ROOT)
    unreadable = Dataset()
    unreadable.LUTExplanation = "no data"
    assert noticed(made(DARK, VOILUTSequence=[unreadable]), "VOI LUT Sequence (0028,3010) that cannot be read")
    assert np.array_equal(grey(made(DARK, VOILUTSequence=[unreadable])), DARK)


def test_a_modality_table_comes_before_the_window() -> None:
    lut = Dataset()
    lut.add_new("LUTDescriptor", "US", [256, 0, 16])
    lut.add_new("LUTData", "OW", (CURVE * 16).astype("<u2").tobytes())
    lut.ModalityLUTType = "US"
    content = made(picture(48, 64), ModalityLUTSequence=[lut], WindowCenter=2040, WindowWidth=4081)
    assert np.abs(grey(content) - SQUARE_ROOT).max() <= 1


HEAT = np.stack([np.arange(256), np.arange(256) ** 2 // 255, 255 - np.arange(256)], axis=-1)


def palette(written_bits: int, scale: int = 1, **attributes: Any) -> bytes:
    for index, name in enumerate(("Red", "Green", "Blue")):
        attributes[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, written_bits]
        attributes[f"{name}PaletteColorLookupTableData"] = (HEAT[:, index] * scale).astype("<u2").tobytes()
    return made(picture(48, 64), PhotometricInterpretation="PALETTE COLOR", **attributes)


@pytest.mark.parametrize(
    ("written_bits", "scale"), [(16, 257), (16, 256), (16, 1), (16, 16), (8, 1), (8, 257), (12, 16)]
)
def test_palettes_of_any_bits(written_bits: int, scale: int) -> None:
    content = palette(written_bits, scale)
    assert np.array_equal(decode(content).frames[0], HEAT[picture(48, 64)])
    real = 8 if scale == 1 else 12 if scale == 16 else 16
    assert noticed(content, "palettes of other bits") == (real != written_bits)


def test_segmented_palettes() -> None:
    ramp = np.array([0, 1, 0, 1, 255, 65535], "<u2").tobytes()
    repeated = np.array([0, 2, 0, 65535, 2, 1, 0, 0] + [0, 252] + [30000] * 252, "<u2").tobytes()
    attributes: dict[str, Any] = {}
    for name, data in (("Red", ramp), ("Green", ramp), ("Blue", repeated)):
        attributes[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        attributes[f"Segmented{name}PaletteColorLookupTableData"] = data
    pixels = np.tile(np.arange(256, dtype=np.uint8), (32, 1))
    frame = decode(made(pixels, PhotometricInterpretation="PALETTE COLOR", **attributes)).frames[0]
    assert np.array_equal(frame[0, :, 0], np.arange(256))
    assert frame[0, :5, 2].tolist() == [0, 255, 0, 255, 30000 >> 8]


def test_palettes_that_are_missing_are_named() -> None:
    assert "Red Palette Color Lookup Table" in refused(made(DARK, PhotometricInterpretation="PALETTE COLOR"))
