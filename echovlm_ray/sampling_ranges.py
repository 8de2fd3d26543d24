"""The allowed ranges of sampling parameters.

Beyond these ranges a number changes nothing noticeable, and far beyond them the arithmetic in float32
overflows.
"""

import struct

Range = tuple[float, float]

TEMPERATURES: Range = (0.01, 100.0)
TOP_P: Range = (0.0001, 1.0)
REPETITION_PENALTIES: Range = (0.01, 100.0)


def in_range(value: float, allowed: Range) -> bool:
    """Whether a number that came as a float32 is in a range, both ends included; NaN never is."""
    low, high = (struct.unpack("f", struct.pack("f", end))[0] for end in allowed)
    return bool(low <= value <= high)


def format_range(allowed: Range) -> str:
    """The range for an error."""
    return f"from {allowed[0]:g} to {allowed[1]:g}"
