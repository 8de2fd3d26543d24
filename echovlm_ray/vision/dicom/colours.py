"""Colours of DICOM to RGB of eight bits: YBR, palettes, and samples of more bits (PS3.3 C.7.6.3.1.2)."""

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset

from echovlm_ray.vision.dicom.errors import InvalidDicomError
from echovlm_ray.vision.dicom.evaluate import evaluated
from echovlm_ray.vision.dicom.header import FrameLayout
from echovlm_ray.vision.dicom.lookup import LookupTable, read_table, real_bits, scaled

_PRIMARIES = ("Red", "Green", "Blue")
# ITU-T T.871, from Y, Cb - 128, Cr - 128 to R, G, B.
_FULL_RANGE = np.array(
    [[1.0, 1.0, 1.0], [0.0, -0.114 * 1.772 / 0.587, 1.772], [1.402, -0.299 * 1.402 / 0.587, 0.0]], dtype=np.float32
)
# Y from 16 to 235, chroma from 16 to 240 (ITU-R BT.601).
_PARTIAL_SCALE = np.array([255 / 219, 255 / 224, 255 / 224], dtype=np.float32)
_FULL_OFFSET = np.array([0, 128, 128], dtype=np.float32)
_PARTIAL_OFFSET = np.array([16, 128, 128], dtype=np.float32)
_ROWS_AT_ONCE = 64
# Of two readings of the colours, the distance from grey must be this much smaller before it is the right one: where
# nothing but an attribute speaks for the other, and where the frames are stored as the attribute says.
CLEARLY_GREYER = 0.5
CERTAINLY_GREYER = 0.25
# The brightness of a picture varies by more than this part of the middle of its range.
_FLAT = 16


def palette_tables(
    dataset: Dataset, *, signed: bool, little_endian: bool, notices: list[str]
) -> tuple[LookupTable, ...]:
    """The three palettes of an object, segmented or not.

    Raises:
        InvalidDicomError: there are not all three of them.
    """
    tables = []
    for primary in _PRIMARIES:
        name = f"{primary}PaletteColorLookupTable"
        table = None
        for data, segmented in ((f"{name}Data", False), (f"Segmented{name}Data", True)):
            table = table or read_table(
                dataset,
                f"{name}Descriptor",
                data,
                signed=signed,
                little_endian=little_endian,
                segmented=segmented,
            )
        if table is None:
            raise InvalidDicomError(
                f"has no {primary} Palette Color Lookup Table Data or Descriptor that can be read, which its "
                "Photometric Interpretation (0028,0004), PALETTE COLOR, asks for; convert it to RGB"
            )
        if table.bits != table.stated_bits:
            notices.append(
                "has palettes of other bits than their Descriptors (0028,1101) to (0028,1103) say; the entries decide"
            )
        tables.append(table)
    return tuple(tables)


def has_palette(dataset: Dataset) -> bool:
    """Whether the object has a palette."""
    return "RedPaletteColorLookupTableDescriptor" in dataset


def palette_to_rgb(frame: npt.NDArray[Any], tables: tuple[LookupTable, ...]) -> npt.NDArray[np.uint8]:
    """Looks values up. Of entries of more than eight bits the upper eight are the colour."""
    shift = max(0, max(table.bits for table in tables) - 8)
    rgb = np.empty((*frame.shape, 3), np.uint8)

    def upper_bits(table: LookupTable, values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
        return (table.look_up(values) >> shift).astype(np.uint8)

    for place, table in enumerate(tables):
        rgb[..., place] = evaluated(frame, partial(upper_bits, table))
    return rgb


def samples_to_rgb(frame: npt.NDArray[Any], colours: str, layout: FrameLayout, bits: int) -> npt.NDArray[np.uint8]:
    """RGB of a frame of three samples.

    Args:
        frame: rows × columns × 3.
        colours: RGB, YBR_FULL or YBR_PARTIAL.
        layout: of the frame.
        bits: that its values really have, from `sample_bits`.
    """
    if bits != 8 or frame.dtype != np.uint8:
        largest = float((1 << bits) - 1)
        low = -float(1 << (bits - 1)) if layout.signed else 0.0
        frame = evaluated(frame, lambda values: scaled(values, low, low + largest))
    if colours == "RGB":
        return np.ascontiguousarray(frame, dtype=np.uint8)
    rgb = np.empty(frame.shape, np.uint8)
    for top in range(0, len(frame), _ROWS_AT_ONCE):
        rows = frame[top : top + _ROWS_AT_ONCE].astype(np.float32)
        if colours == "YBR_PARTIAL":
            rows = (rows - _PARTIAL_OFFSET) * _PARTIAL_SCALE
        else:
            rows -= _FULL_OFFSET
        rgb[top : top + _ROWS_AT_ONCE] = np.floor(rows @ _FULL_RANGE + 0.5).clip(0, 255).astype(np.uint8)
    return rgb


def sample_bits(frames: list[npt.NDArray[Any]], layout: FrameLayout) -> int:
    """How many bits the samples of colour frames have; all frames are treated alike."""
    if layout.stored <= 8 or layout.signed:
        return layout.stored
    return real_bits(max(int(frame.max()) for frame in frames), layout.stored)


def looks_like(values: npt.NDArray[Any], bits: int, share: float = CLEARLY_GREYER) -> str | None:
    """RGB or YBR_FULL, whichever makes the picture clearly greyer, as most of an ultrasound image is; None if neither.

    Args:
        values: rows × columns × 3.
        bits: of a value.
        share: how much nearer to grey one reading must be than the other.
    """
    sample = values[:: max(1, values.shape[0] // 64), :: max(1, values.shape[1] // 64)].astype(np.float32)
    middle = float(1 << (bits - 1))
    as_ybr = float(np.abs(sample[..., 1:] - middle).mean())
    as_rgb = float(np.abs(sample[..., 1:] - sample[..., :1]).mean())
    if as_rgb < share * as_ybr:
        return "RGB"
    # A picture of one colour is no evidence of chroma.
    is_varied = float(sample[..., 0].std()) > middle / _FLAT
    return "YBR_FULL" if is_varied and as_ybr < share * as_rgb else None
