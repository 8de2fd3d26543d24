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

# The other reading must be this much smoother before the attributes are not believed.
_CLEARLY_SMOOTHER = 0.8
# Of a large picture, these many values tell enough.
_SAMPLE_ROWS = 512

Values = npt.NDArray[Any]


def stored_values(
    frames: Sequence[Values], layout: FrameLayout, notices: list[str]
) -> tuple[list[Values], FrameLayout]:
    """Frames of the values that count, and the layout that they have; all frames are treated alike."""
    first = frames[0]
    if first.dtype.kind != "u":
        return list(frames), layout
    bits = first.dtype.itemsize * 8
    if layout.stored == bits and not layout.signed:
        return list(frames), layout
    used = int(np.bitwise_or.reduce([int(np.bitwise_or.reduce(frame, axis=None)) for frame in frames]))
    layout = _settled_shift(layout, used, bits, notices)
    if layout.signed:
        layout = _settled_sign(first, layout, bits, notices)
    above = used >> (layout.high_bit + 1)
    if above and layout.stored < bits and _is_smoother(first, replace(layout, stored=bits, high_bit=bits - 1), layout):
        notices.append("has values of more bits than its Bits Stored (0028,0101) says; they are taken in full")
        layout = replace(layout, stored=bits, high_bit=bits - 1)
    return [_read(frame, layout) for frame in frames], layout


def _settled_shift(layout: FrameLayout, used: int, bits: int, notices: list[str]) -> FrameLayout:
    shift = layout.high_bit + 1 - layout.stored
    if shift > 0 and used & ((1 << shift) - 1) and not used >> layout.stored:
        notices.append("has values in lower bits than its High Bit (0028,0102) says; they are taken from there")
        return replace(layout, high_bit=layout.stored - 1)
    return layout


def _settled_sign(frame: Values, layout: FrameLayout, bits: int, notices: list[str]) -> FrameLayout:
    unsigned = replace(layout, signed=False)
    if layout.stored == 8 and _is_smoother(frame, unsigned, layout):
        notices.append("has a Pixel Representation (0028,0103) that does not fit its pixel data; they are unsigned")
        return unsigned
    return layout


def _is_smoother(frame: Values, other: FrameLayout, labelled: FrameLayout) -> bool:
    sample = frame[:_SAMPLE_ROWS]
    return _roughness(_read(sample, other)) < _CLEARLY_SMOOTHER * _roughness(_read(sample, labelled))


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
