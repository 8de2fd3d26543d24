"""Values of more or fewer than eight bits to eight.

Programs like ITK and ImageJ write the 8 or 12 bits of a detector into 16-bit files as they are, so the files' own
depth makes such a picture black. Which depth is meant is seen from the values: the even number of bits they fit into,
unless they are eight bits that were widened to sixteen.
Too small a depth brightens a picture; too large a one loses most of its grey levels.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from echovlm_ray.vision.picture import FrameArray

_DEPTHS = (8, 10, 12, 14)
_FIRST_VALUES = 4096


def to_eight_bits(
    arrays: Sequence[npt.NDArray[np.generic]], bits: int, significant: int | None = None
) -> tuple[list[FrameArray], tuple[str, ...]]:
    """Scales what a file stores to 0 … 255, all its frames alike.

    Args:
        arrays: of any shape: booleans, integers or floats.
        bits: how many bits an unsigned value has by the file's header; floats and signed integers do not use it.
        significant: the number of significant bits in the file (the sBIT chunk of a PNG); used if the values fit.

    Returns:
        The arrays as uint8, and notices of what was assumed.
    """
    kind = arrays[0].dtype.kind
    if kind == "b":
        return [array.astype(np.uint8) * np.uint8(255) for array in arrays], ()
    if kind == "f":
        return _floats(arrays)
    signed = kind == "i"
    if signed and min(int(array.min()) for array in arrays) < 0:
        return _stretched(arrays, "Its values are signed")
    if bits <= 8:
        return _scaled(arrays, bits), ()
    highest = max(int(array.max()) for array in arrays)
    if highest >= 2**16:
        return _stretched(arrays, "Its values have more than 16 bits")
    if bits < 16:
        return _scaled(arrays, bits), ()
    depths: tuple[int, ...] = (*_DEPTHS, 15) if signed else _DEPTHS
    if significant is not None and significant < 16:
        depths = (significant,)
    depth = next((depth for depth in depths if highest < 2**depth), 16)
    if (depth == 16 and bits == 16) or not highest or (significant is None and _are_widened(arrays, bits)):
        return _scaled(arrays, 16), ()
    return _scaled(arrays, depth), (
        f"Its values are stored in {bits} bits and all fit into {depth}, so they are shown as {depth}-bit values.",
    )


def _are_widened(arrays: Sequence[npt.NDArray[np.generic]], bits: int) -> bool:
    """Whether unsigned values of 16 bits are eight bits, times 256 or 257, so that a dark picture is just dark."""
    if bits != 16 or any(array.dtype != np.uint16 for array in arrays):
        return False
    factors = [
        factor
        for factor in (256, 257)
        # Some values suffice to see that most pictures are not.
        if not any((array.reshape(-1)[:_FIRST_VALUES].astype(np.uint16) % factor).any() for array in arrays)
    ]
    return any(not any((array.astype(np.uint16) % factor).any() for array in arrays) for factor in factors)


def _scaled(arrays: Sequence[npt.NDArray[np.generic]], bits: int) -> list[FrameArray]:
    if arrays[0].dtype == np.uint8 and bits == 8:
        return [np.asarray(array, dtype=np.uint8) for array in arrays]
    # Of all values of 16 bits, so that nothing needs to be clipped or widened before it is looked up.
    table = np.rint((np.arange(2**16) * (255.0 / (2**bits - 1))).clip(0, 255)).astype(np.uint8)
    return [table[array.astype(np.uint16, copy=False)] for array in arrays]


def _floats(arrays: Sequence[npt.NDArray[np.generic]]) -> tuple[list[FrameArray], tuple[str, ...]]:
    values = [np.nan_to_num(array.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0) for array in arrays]
    low, high = min(float(array.min()) for array in values), max(float(array.max()) for array in values)
    if low >= 0.0 and high <= 1.0:
        return [np.rint(array * 255.0).astype(np.uint8) for array in values], (
            "Its values are floats from 0 to 1, so 1 is shown as white.",
        )
    if low >= 0.0 and high < 256.0:
        return [np.rint(array.clip(0.0, 255.0)).astype(np.uint8) for array in values], (
            "Its values are floats below 256, so 255 is shown as white.",
        )
    return _stretched(values, "Its values are floats")


def _stretched(arrays: Sequence[npt.NDArray[np.generic]], why: str) -> tuple[list[FrameArray], tuple[str, ...]]:
    values = [array.astype(np.float64) for array in arrays]
    low, high = min(float(array.min()) for array in values), max(float(array.max()) for array in values)
    span = (high - low) or 1.0
    frames = [np.rint((array - low) * (255.0 / span)).astype(np.uint8) for array in values]
    return frames, (f"{why}, so the smallest is shown as black and the largest as white.",)
