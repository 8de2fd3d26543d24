"""Lookup tables of DICOM: palettes, Modality LUT and VOI LUT (PS3.3 C.7.6.3.1.5, C.7.9.2, C.11.1, C.11.2).

A descriptor has the number of entries, the stored value of the first one, and the number of bits per entry.
The last is often wrong: the entries themselves decide.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset

from echovlm_ray.vision.dicom.attributes import numbers

# Entries that use no more than a sixteenth of their range were written with fewer bits.
_UNUSED_BITS = 4
_LIKELY_BITS = (8, 10, 12)
# The largest value of so many bits is a sign of them, also where it uses more than a sixteenth.
_ALL_ONES = {(1 << bits) - 1: bits for bits in (8, 10, 12, 14)}
_DISCRETE, _LINEAR, _INDIRECT = 0, 1, 2


@dataclass(frozen=True, slots=True, eq=False)
class LookupTable:
    """Entries for the values from `first` on; smaller and larger values take the nearest one.

    Attributes:
        first: the value that the first entry is for.
        entries: uint16.
        bits: how many of them count.
        stated_bits: the descriptor's.
    """

    first: int
    entries: npt.NDArray[np.uint16]
    bits: int
    stated_bits: int

    def look_up(self, values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
        """The entries of values, which may be fractions."""
        places = np.rint(values).clip(self.first, self.first + len(self.entries) - 1) - self.first
        entries: npt.NDArray[np.uint16] = self.entries[places.astype(np.int64)]
        return entries

    def eight_bits(self, values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """The entries of values, scaled to 0 … 255."""
        return scaled(self.look_up(values).astype(np.float64), 0.0, float((1 << self.bits) - 1))


def real_bits(largest: int, stated: int) -> int:
    """How many bits values have whose largest one is given, where they are said to have `stated`."""
    if largest in _ALL_ONES:
        return _ALL_ONES[largest]
    if largest >= 1 << stated:
        return next((bits for bits in (*_LIKELY_BITS, 16, 32) if largest < 1 << bits), 64)
    return next((bits for bits in _LIKELY_BITS if bits <= stated - _UNUSED_BITS and largest < 1 << bits), stated)


def scaled(values: npt.NDArray[np.float64], low: float, high: float) -> npt.NDArray[np.uint8]:
    """Values from `low` to `high` as 0 … 255."""
    if high <= low:
        return np.zeros(values.shape, dtype=np.uint8)
    return np.rint(((values - low) / (high - low)).clip(0.0, 1.0) * 255.0).astype(np.uint8)


def read_table(
    dataset: Dataset, descriptor: str, data: str, *, signed: bool, little_endian: bool, segmented: bool = False
) -> LookupTable | None:
    """A table, or None where its descriptor or its data are missing, empty or cannot be read.

    Args:
        dataset: the object, or the table's sequence item.
        descriptor: keyword.
        data: keyword.
        signed: whether the values that are looked up can be negative.
        little_endian: whether the file is.
        segmented: whether the data are segments instead of entries (PS3.3 C.7.9.2).
    """
    described = numbers(dataset, descriptor)
    raw = _raw(dataset, data, little_endian)
    if len(described) < 3 or not raw:
        return None
    count = int(described[0]) & 0xFFFF or 0x10000
    first = int(described[1])
    if signed and first > 0x7FFF:
        first -= 0x10000
    elif not signed and first < 0:
        first += 0x10000
    stated = int(described[2]) if 1 <= described[2] <= 16 else 16
    read = _expanded if segmented else _entries
    entries = read(raw, count, stated, not little_endian)
    if entries is None:
        return None
    return LookupTable(first, entries, _entry_bits(entries, stated), stated)


def _entry_bits(entries: npt.NDArray[np.uint16], stated: int) -> int:
    """How many bits entries have. Eight bits that were widened to sixteen have them, however dark they are."""
    upper, lower = entries >> 8, entries & 0xFF
    if stated == 16 and upper.any() and (not lower.any() or np.array_equal(upper, lower)):
        return stated
    return real_bits(int(entries.max()), stated)


def _raw(dataset: Dataset, keyword: str, little_endian: bool) -> bytes:
    """The data as bytes, whichever value representation they were written with."""
    try:
        value = dataset.get(keyword, None)
        if isinstance(value, bytes):
            return value
        if value is None:
            return b""
        words = np.atleast_1d(np.asarray(value, dtype=np.int64)) & 0xFFFF
        return words.astype("<u2" if little_endian else ">u2").tobytes()
    except Exception:
        # Any exception: what a parser raises on hostile bytes is not to be foreseen.
        return b""


def _entries(raw: bytes, count: int, stated: int, big_endian: bool) -> npt.NDArray[np.uint16] | None:
    is_bytes = len(raw) in (count, count + 1) or (len(raw) < count and stated == 8)
    entries = _bytes(raw, big_endian) if is_bytes else _words(raw, big_endian)
    return entries[:count] if len(entries) else None


def _words(raw: bytes, big_endian: bool) -> npt.NDArray[np.uint16]:
    return np.frombuffer(raw[: len(raw) // 2 * 2], ">u2" if big_endian else "<u2").astype(np.uint16)


def _bytes(raw: bytes, big_endian: bool) -> npt.NDArray[np.uint16]:
    if not big_endian:
        return np.frombuffer(raw, np.uint8).astype(np.uint16)
    # Two entries to a word, the first one in its lower byte.
    return np.frombuffer(raw[: len(raw) // 2 * 2], np.uint16).byteswap().view(np.uint8).astype(np.uint16)


def _expanded(raw: bytes, count: int, stated: int, big_endian: bool) -> npt.NDArray[np.uint16] | None:
    readings = [(_words(raw, big_endian), True), (_bytes(raw, big_endian), False)]
    for segments, wide in readings if stated > 8 else reversed(readings):
        knots = _knots(segments.tolist(), count, 2 if wide else 1)
        if knots is not None:
            return np.rint(np.interp(np.arange(count), *knots)).astype(np.uint16)
    return None


def _knots(segments: list[int], count: int, unit_bytes: int) -> tuple[list[int], list[int]] | None:
    """Places and values between which the entries are interpolated; None where the segments make no sense."""
    places: list[int] = []
    values: list[int] = []
    position = filled = resume = copies = 0
    while filled < count:
        if position + 2 >= len(segments):
            return None
        opcode, length = segments[position], segments[position + 1]
        if opcode == _DISCRETE and 0 < length <= len(segments) - position - 2:
            places.extend(range(filled, filled + length))
            values.extend(segments[position + 2 : position + 2 + length])
            filled += length
            position += 2 + length
        elif opcode == _LINEAR and length and filled:
            filled += length
            places.append(filled - 1)
            values.append(segments[position + 2])
            position += 3
        elif opcode == _INDIRECT and length and not copies:
            # So many segments again, from an offset in bytes that has 32 bits.
            copies, resume = length, position + 2 + 4 // unit_bytes
            parts = segments[position + 2 : resume]
            position = sum(part << (8 * unit_bytes * place) for place, part in enumerate(parts)) // unit_bytes
            continue
        else:
            return None
        if copies:
            copies -= 1
            position = position if copies else resume
    return places, values
