"""The allowed ranges of sampling parameters.

Outside of these ranges a parameter has no noticeable effect, and far outside of them float32 overflows.
"""

import struct

Range = tuple[float, float]

TEMPERATURES: Range = (0.01, 100.0)
TOP_P: Range = (0.0001, 1.0)
REPETITION_PENALTIES: Range = (0.01, 100.0)


def in_range(value: float, allowed: Range) -> bool:
    """Whether a float32 number is in a range, both ends included; false for NaN."""
    low, high = (struct.unpack("f", struct.pack("f", end))[0] for end in allowed)
    return bool(low <= value <= high)


def format_range(allowed: Range) -> str:
    """The range as text, for errors."""
    return f"from {allowed[0]:g} to {allowed[1]:g}"
