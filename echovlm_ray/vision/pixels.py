"""Stored DICOM values to RGB: palettes, greyscale windows, and colours of more than eight bits."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut

_COLOURS = ("Red", "Green", "Blue")


class UnknownPixelsError(ValueError):
    """A photometric interpretation that cannot be shown. The text begins with a verb, its subject being the file."""


def to_rgb(
    arrays: Sequence[npt.NDArray[np.generic]], interpretation: str, dataset: Dataset
) -> list[npt.NDArray[np.uint8]]:
    """RGB of the frames of one object, all treated alike.

    Args:
        arrays: decoded frames, rows × columns (× samples); YBR is RGB already.
        interpretation: the photometric interpretation that the decoded frames have.
        dataset: the object, for palettes, windows and bit depths.

    Raises:
        UnknownPixelsError: the interpretation is not known here.
    """
    if interpretation == "RGB":
        return [_eight_bits(array, dataset.BitsStored) for array in arrays]
    if interpretation == "PALETTE COLOR":
        return _palette(arrays, dataset)
    if interpretation in ("MONOCHROME1", "MONOCHROME2"):
        grey = _grey(arrays, dataset)
        if interpretation == "MONOCHROME1":
            grey = [255 - frame for frame in grey]
        return [np.repeat(frame[..., None], 3, axis=-1) for frame in grey]
    raise UnknownPixelsError(
        "has a photometric interpretation that is not accepted; convert it to MONOCHROME2, RGB, YBR_FULL or "
        "PALETTE COLOR"
    )


def _eight_bits(array: npt.NDArray[np.generic], bits: int) -> npt.NDArray[np.uint8]:
    if bits == 8:
        return array.astype(np.uint8)
    return _scaled(array.astype(np.float64), 0.0, float(2**bits - 1))


def _scaled(array: npt.NDArray[np.float64], low: float, high: float) -> npt.NDArray[np.uint8]:
    if high <= low:
        return np.zeros(array.shape, dtype=np.uint8)
    return np.rint(((array - low) / (high - low)).clip(0.0, 1.0) * 255.0).astype(np.uint8)


def _palette(arrays: Sequence[npt.NDArray[np.generic]], dataset: Dataset) -> list[npt.NDArray[np.uint8]]:
    """Looks the values up; of 16-bit entries the upper byte is the colour, as DICOM PS3.3 C.7.6.3.1.5 has it."""
    if not dataset.original_encoding[1]:
        _swap_lookup_tables(dataset)
    frames = []
    for array in arrays:
        rgb = apply_color_lut(array, dataset)
        frames.append(np.ascontiguousarray(rgb if rgb.dtype == np.uint8 else (rgb >> 8).astype(np.uint8)))
    return frames


def _swap_lookup_tables(dataset: Dataset) -> None:
    # pydicom leaves the words of OW elements as they are in the file and reads them as little endian.
    for colour in _COLOURS:
        keyword = f"{colour}PaletteColorLookupTableData"
        if keyword in dataset:
            setattr(dataset, keyword, np.frombuffer(getattr(dataset, keyword), dtype="<u2").byteswap().tobytes())


def _grey(arrays: Sequence[npt.NDArray[np.generic]], dataset: Dataset) -> list[npt.NDArray[np.uint8]]:
    """Eight-bit grey of monochrome values, small values dark.

    The object's VOI lookup table or window if it has one; else eight stored bits as they are, and more bits stretched
    from the smallest to the largest value of all the frames, so that brightness does not jump between them.
    """
    values = [apply_modality_lut(array, dataset) for array in arrays]
    if dataset.get("VOILUTSequence", None):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        return [_eight_bits(apply_voi_lut(array, dataset, prefer_lut=True), bits) for array in values]
    if dataset.get("WindowWidth", None) is not None and dataset.get("WindowCenter", None) is not None:
        centre, width = _first(dataset.WindowCenter), _first(dataset.WindowWidth)
        function = str(dataset.get("VOILUTFunction", None) or "LINEAR")
        return [_windowed(array.astype(np.float64), centre, width, function) for array in values]
    if dataset.BitsStored == 8 and all(array.dtype == np.uint8 for array in values):
        return [array.astype(np.uint8) for array in values]
    low = min(float(array.min()) for array in values)
    high = max(float(array.max()) for array in values)
    return [_scaled(array.astype(np.float64), low, high) for array in values]


def _first(value: object) -> float:
    return float(value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value)  # type: ignore[arg-type]


def _windowed(array: npt.NDArray[np.float64], centre: float, width: float, function: str) -> npt.NDArray[np.uint8]:
    """A window of DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, to 0 … 255."""
    if function == "SIGMOID" and width > 0:
        return _scaled(1.0 / (1.0 + np.exp((-4.0 * (array - centre) / width).clip(-700, 700))), 0.0, 1.0)
    if function == "LINEAR_EXACT" and width > 0:
        return _scaled(array, centre - width / 2, centre + width / 2)
    if width < 1:
        raise UnknownPixelsError(
            "has a window without width; remove its Window Center and Window Width, or repair them"
        )
    if width == 1:
        return np.where(array <= centre - 0.5, 0, 255).astype(np.uint8)
    low = centre - 0.5 - (width - 1) / 2
    return _scaled(array, low, low + width - 1)
