"""Stored values of monochrome frames to grey of eight bits (DICOM PS3.3 C.7.6.16.2, C.11.1, C.11.2 and C.11.6).

The order is the standard's: Modality LUT or rescale, VOI LUT or window, inversion. Padding is black in the end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset

from echovlm_ray.vision.dicom.attributes import has, integer, items, number, numbers, word
from echovlm_ray.vision.dicom.evaluate import evaluated
from echovlm_ray.vision.dicom.header import FrameLayout
from echovlm_ray.vision.dicom.lookup import LookupTable, read_table, scaled

_ROWS_AT_ONCE = 64
_GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
_NO_WIDTH = "has a window without width, which is left out"

Values = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Window:
    """A window of VOI, in modality values."""

    centre: float
    width: float
    function: str

    def eight_bits(self, values: Floats) -> Bytes:
        """PS3.3 C.11.2.1.2 and C.11.2.1.3, to 0 … 255."""
        if self.function == "SIGMOID":
            exponent = (-4.0 * (values - self.centre) / self.width).clip(-700, 700)
            return scaled(1.0 / (1.0 + np.exp(exponent)), 0.0, 1.0)
        if self.function == "LINEAR_EXACT" or self.width < 1:
            return scaled(values, self.centre - self.width / 2, self.centre + self.width / 2)
        if self.width == 1:
            return np.where(values <= self.centre - 0.5, 0, 255).astype(np.uint8)
        low = self.centre - 0.5 - (self.width - 1) / 2
        return scaled(values, low, low + self.width - 1)


@dataclass(frozen=True, slots=True)
class Padding:
    """The stored values that are no image (PS3.3 C.7.5.1.1.2), both ends included."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class GreyRule:
    """How one frame becomes grey: what its attributes, or its functional groups, ask for.

    Attributes:
        slope, intercept: of the rescale; 1 and 0 without one.
        modality: a table instead of the rescale.
        voi: a table or a window; None without.
    """

    slope: float
    intercept: float
    modality: LookupTable | None
    voi: LookupTable | Window | None

    def modality_values(self, stored: Floats) -> Floats:
        """Modality values of stored ones."""
        if self.modality is not None:
            return self.modality.look_up(stored).astype(np.float64)
        return stored if (self.slope, self.intercept) == (1.0, 0.0) else stored * self.slope + self.intercept


def grey_frames(
    frames: Sequence[Values],
    indices: Sequence[int],
    dataset: Dataset,
    layout: FrameLayout,
    *,
    little_endian: bool,
    notices: list[str],
) -> list[Bytes]:
    """Grey of frames, small values dark unless the object specifies the opposite.

    Without a VOI LUT or a window, values of up to eight bits stay as they are; more bits are stretched from the
    smallest to the largest value of all the frames, so that brightness does not jump between them.

    Args:
        frames: rows × columns of stored values.
        indices: their places in the object, for functional groups by frame.
        dataset: the object.
        layout: of the frames.
        little_endian: whether lookup tables are.
        notices: added to.
    """
    rules = _rules(dataset, indices, layout, little_endian, notices)
    padding = _padding(dataset, layout, notices)
    inverted = layout.photometric == "MONOCHROME1" or word(dataset, "PresentationLUTShape") == "INVERSE"
    limits = None
    if layout.signed and layout.stored <= 8 and min(int(frame.min()) for frame in frames) >= 0:
        # Bytes that only claim to be signed.
        layout = replace(layout, signed=False)
    if any(rule.voi is None and _full_range(rule, layout) is None for rule in rules):
        limits = _limits(frames, rules, padding)

    if _is_blank(frames, rules, padding):
        notices.append("has a window in which its picture is of one shade, which is left out")
        rules = [replace(rule, voi=None) for rule in rules]
        limits = _limits(frames, rules, padding)

    def show(rule: GreyRule, stored: Floats) -> Bytes:
        values = rule.modality_values(stored)
        if rule.voi is not None:
            grey = rule.voi.eight_bits(values)
        else:
            low, high = _full_range(rule, layout) or limits or (0.0, 0.0)
            grey = scaled(np.nan_to_num(values, nan=low, posinf=high, neginf=low), low, high)
        if inverted:
            grey = 255 - grey
        if padding is not None:
            grey[(stored >= padding.low) & (stored <= padding.high)] = 0
        return grey

    return [evaluated(frame, partial(show, rule)) for frame, rule in zip(frames, rules, strict=True)]


def _full_range(rule: GreyRule, layout: FrameLayout) -> tuple[float, float] | None:
    """What eight bits or fewer could be at most and at least; None where the picture's own range is taken."""
    if rule.modality is not None:
        return (0.0, float((1 << rule.modality.bits) - 1)) if min(layout.stored, rule.modality.bits) <= 8 else None
    if layout.stored > 8:
        return None
    lowest = -(1 << (layout.stored - 1)) if layout.signed else 0
    ends = sorted(rule.intercept + rule.slope * value for value in (lowest, lowest + (1 << layout.stored) - 1))
    return ends[0], ends[1]


def _limits(frames: Sequence[Values], rules: Sequence[GreyRule], padding: Padding | None) -> tuple[float, float]:
    low, high = math.inf, -math.inf
    for frame, rule in zip(frames, rules, strict=True):
        for top in range(0, len(frame), _ROWS_AT_ONCE):
            stored = frame[top : top + _ROWS_AT_ONCE].astype(np.float64)
            kept = np.isfinite(stored)
            if padding is not None:
                kept &= (stored < padding.low) | (stored > padding.high)
            values = rule.modality_values(stored[kept])
            if values.size:
                low, high = min(low, float(values.min())), max(high, float(values.max()))
    return (low, high) if low <= high else (0.0, 0.0)


def padding_ends(dataset: Dataset) -> tuple[int, ...]:
    """Pixel Padding Value, and Pixel Padding Range Limit where there is one, as written; empty without padding."""
    value, limit = integer(dataset, "PixelPaddingValue"), integer(dataset, "PixelPaddingRangeLimit")
    if value is None:
        return () if limit is None or "PixelPaddingValue" not in dataset else (limit,)
    return (value,) if limit is None else (value, limit)


def _is_blank(frames: Sequence[Values], rules: Sequence[GreyRule], padding: Padding | None) -> bool:
    """Whether nothing of frames that do show something is seen in their windows."""
    varied = False
    for frame, rule in zip(frames, rules, strict=True):
        if not isinstance(rule.voi, Window):
            return False
        if padding is None and rule.modality is None:
            low, high = rule.modality_values(np.array([frame.min(), frame.max()], np.float64))
        else:
            low, high = _limits([frame], [rule], padding)
        shades = rule.voi.eight_bits(np.array([low, high]))
        if shades[0] != shades[1]:
            return False
        varied = varied or bool(low != high)
    return varied


def _padding(dataset: Dataset, layout: FrameLayout, notices: list[str]) -> Padding | None:
    ends = [_as_stored(value, layout) for value in padding_ends(dataset)]
    if not ends:
        return None
    if max(ends) - min(ends) >= (1 << layout.stored) - 1:
        notices.append("has a Pixel Padding Range Limit (0028,0121) that leaves no picture, which is left out")
        return None
    return Padding(min(ends), max(ends))


def _as_stored(value: int, layout: FrameLayout) -> float:
    """A value as the pixels have it, whether it was written as signed or not."""
    # Padding may have more bits than are stored.
    span = 1 << (layout.stored if value < 1 << layout.stored else layout.allocated)
    if layout.signed and value >= span // 2:
        return value - span
    return value + (1 << layout.allocated) if value < 0 and not layout.signed else value


def _rules(
    dataset: Dataset, indices: Sequence[int], layout: FrameLayout, little_endian: bool, notices: list[str]
) -> list[GreyRule]:
    shared = items(dataset, "SharedFunctionalGroupsSequence")[:1]
    by_frame = (
        items(dataset, "PerFrameFunctionalGroupsSequence") if has(dataset, "PerFrameFunctionalGroupsSequence") else []
    )
    general: GreyRule | None = None
    rules = []
    for index in indices:
        groups = by_frame[index : index + 1] + shared
        places = [place for group in groups for keyword in _GROUPS for place in items(group, keyword)[:1]]
        if not places and general is not None:
            rules.append(general)
            continue
        rule = _rule([*places, dataset], layout, little_endian, notices)
        if not places:
            general = rule
        rules.append(rule)
    return rules


def _rule(places: list[Dataset], layout: FrameLayout, little_endian: bool, notices: list[str]) -> GreyRule:
    slope, intercept = _rescale(places, notices)
    modality, voi = None, None
    for place in places:
        if modality is None:
            modality = _table(place, "ModalityLUTSequence", layout.signed, little_endian, notices)
        if voi is None:
            negative = layout.signed or intercept < 0
            voi = _table(place, "VOILUTSequence", negative, little_endian, notices) or _window(place, notices)
    return GreyRule(slope, intercept, modality, voi)


def _rescale(places: list[Dataset], notices: list[str]) -> tuple[float, float]:
    for place in places:
        slope, intercept = number(place, "RescaleSlope"), number(place, "RescaleIntercept")
        if slope == 0:
            notices.append("has a Rescale Slope (0028,1053) of nothing, which is left out")
        elif slope is not None or intercept is not None:
            return (1.0 if slope is None else slope), (intercept or 0.0)
    return 1.0, 0.0


def _table(place: Dataset, keyword: str, signed: bool, little_endian: bool, notices: list[str]) -> LookupTable | None:
    found = items(place, keyword)
    name = "Modality LUT Sequence (0028,3000)" if keyword == "ModalityLUTSequence" else "VOI LUT Sequence (0028,3010)"
    for item in found:
        table = read_table(item, "LUTDescriptor", "LUTData", signed=signed, little_endian=little_endian)
        if table is not None:
            if table.bits != table.stated_bits and keyword == "VOILUTSequence":
                notices.append(
                    f"has a {name} of other bits than its LUT Descriptor (0028,3002) says; the entries decide"
                )
            return table
    if found:
        notices.append(f"has a {name} that cannot be read, which is left out")
    return None


def _window(place: Dataset, notices: list[str]) -> Window | None:
    """The first window that has a width."""
    centres, widths = numbers(place, "WindowCenter"), numbers(place, "WindowWidth")
    function = word(place, "VOILUTFunction") or "LINEAR"
    for centre, width in zip(centres, widths, strict=False):
        if width > 0:
            return Window(centre, width, function)
    if centres or widths:
        notices.append(_NO_WIDTH)
    return None
