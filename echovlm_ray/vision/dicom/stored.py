"""Which bits of a decoded value count (DICOM PS3.5 8.1.1): shifted, masked and signed as High Bit and Bits Stored say,
unless the picture shows that they say it wrongly.

Read with the wrong bits, neighbouring pixels have little to do with each other. So of two readings, the smoother one
is right.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from echovlm_ray.vision.dicom.header import FrameLayout

# The other interpretation must be this much smoother to override the attributes.
_CLEARLY_SMOOTHER = 0.8
# Padding and overlays make a picture of many bits somewhat rougher; a wrong sign makes it far rougher.
_FAR_SMOOTHER = 0.5
# Of a large picture, about so many rows tell enough.
_SAMPLE_ROWS = 128

Values = npt.NDArray[Any]


def stored_values(
    frames: Sequence[Values], layout: FrameLayout, notices: list[str], padding: Sequence[int] = ()
) -> tuple[list[Values], FrameLayout]:
    """Frames of the values that count, and the layout that they have; all frames are treated alike.

    Args:
        frames: as they were decoded.
        layout: of the frames.
        notices: added to.
        padding: the ends of the range of padding values, as written. Where they have more bits than are stored, and
            nothing else does, values keep all their bits, so that padding stays different from the picture.
    """
    first = frames[0]
    if first.dtype.kind != "u":
        return list(frames), layout
    bits = first.dtype.itemsize * 8
    if layout.stored == bits and not layout.signed:
        return list(frames), layout
    if _only_padding_is_wide(frames, layout, bits, padding):
        return [_read(frame, replace(layout, stored=bits, high_bit=bits - 1)) for frame in frames], layout
    used = int(np.bitwise_or.reduce([int(np.bitwise_or.reduce(frame, axis=None)) for frame in frames]))
    layout = _settled_shift(frames, layout, used, bits, notices)
    if layout.signed:
        layout = _settled_sign(first, layout, bits, notices)
    above = used >> (layout.high_bit + 1)
    if above and layout.stored < bits and _is_smoother(first, replace(layout, stored=bits, high_bit=bits - 1), layout):
        notices.append("has values of more bits than its Bits Stored (0028,0101) says; they are taken in full")
        layout = replace(layout, stored=bits, high_bit=bits - 1)
    return [_read(frame, layout) for frame in frames], layout


def _only_padding_is_wide(frames: Sequence[Values], layout: FrameLayout, bits: int, padding: Sequence[int]) -> bool:
    if not padding or layout.stored == bits or layout.high_bit >= layout.stored:
        return False
    low, high = sorted(value % (1 << bits) for value in (padding[0], padding[-1]))
    if low < 1 << layout.stored:
        return False
    signed = replace(layout, stored=bits, high_bit=bits - 1)
    return all(_fits(_read(frame[(frame < low) | (frame > high)], signed), layout) for frame in frames)


def _fits(values: Values, layout: FrameLayout) -> bool:
    """Whether values have no more bits than are stored."""
    if not values.size:
        return True
    half = 1 << (layout.stored - 1)
    low, high = (-half, half - 1) if layout.signed else (0, 2 * half - 1)
    return low <= int(values.min()) and int(values.max()) <= high


def _settled_shift(
    frames: Sequence[Values], layout: FrameLayout, used: int, bits: int, notices: list[str]
) -> FrameLayout:
    """The layout with the high bit that the values have: they fill neither too few bits nor too many."""
    low = replace(layout, high_bit=layout.stored - 1)
    if layout.high_bit >= layout.stored:
        whole = replace(layout, stored=bits, high_bit=bits - 1)
        fits = not used >> layout.stored or (
            layout.signed and all(_fits(_read(frame, whole), layout) for frame in frames)
        )
        if used and fits:
            notices.append("has values in lower bits than its High Bit (0028,0102) says; they are taken from there")
            return low
    elif layout.stored > 8 and used >> layout.stored and not used & ((1 << (bits - layout.stored)) - 1):
        high = replace(layout, high_bit=bits - 1)
        # Otherwise the upper bits are an overlay.
        if _is_smoother(frames[0], high, layout):
            notices.append("has values in higher bits than its High Bit (0028,0102) says; they are taken from there")
            return high
    return layout


def _settled_sign(frame: Values, layout: FrameLayout, bits: int, notices: list[str]) -> FrameLayout:
    unsigned = replace(layout, signed=False)
    if _is_smoother(frame, unsigned, layout, _CLEARLY_SMOOTHER if layout.stored == 8 else _FAR_SMOOTHER):
        notices.append("has a Pixel Representation (0028,0103) that does not fit its pixel data; they are unsigned")
        return unsigned
    return layout


def _is_smoother(frame: Values, other: FrameLayout, labelled: FrameLayout, share: float = _CLEARLY_SMOOTHER) -> bool:
    sample = frame[:: max(1, len(frame) // _SAMPLE_ROWS)]
    return _roughness(_read(sample, other)) < share * _roughness(_read(sample, labelled))


def _roughness(values: Values) -> float:
    if values.shape[1] < 2:
        return 0.0
    return float(np.abs(np.diff(values.astype(np.float32), axis=1)).mean())


def _read(frame: Values, layout: FrameLayout) -> Values:
    """The stored bits alone, in one pass: what lies above is shifted out, and what lies below as well."""
    bits = frame.dtype.itemsize * 8
    above = bits - 1 - layout.high_bit
    values = frame if above <= 0 else np.left_shift(frame, above)
    if layout.signed:
        values = (
            values.view(np.dtype(f"i{frame.dtype.itemsize}"))
            if values.flags.c_contiguous
            else values.astype(f"i{frame.dtype.itemsize}")
        )
    down = bits - layout.stored
    return np.right_shift(values, down) if down > 0 else values
