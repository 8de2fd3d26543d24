"""Finds the attributes after one with a wrong length, from the bytes.

A parser that trusts such a length resumes in the middle of a value, and everything after it is lost.
"""

from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, VR

_VRS = frozenset(vr.value.encode() for vr in VR if len(vr.value) == 2)
_LONG_VRS = frozenset(vr.value.encode() for vr in EXPLICIT_VR_LENGTH_32)
_UNDEFINED_LENGTH = 0xFFFFFFFF
# A wrong length is wrong by a few bytes; a parser that looks further finds what only looks like an attribute.
_SEARCH_BYTES = 64
_SEQUENCE_BYTES = 256 * 1024
_MAX_ELEMENTS = 2000


def repaired_elements(
    content: bytes, start: int, implicit: bool, little_endian: bool, stop_tags: frozenset[int]
) -> tuple[bytes, int] | None:
    """The attributes up to one of `stop_tags`, lengths put right, and where that one starts.

    Returns:
        None where none of `stop_tags` is found, or where the first attribute cannot be read already.
    """
    reader = _Reader(content, implicit, little_endian)
    elements: list[bytes] = []
    position, previous = start, 0
    for _ in range(_MAX_ELEMENTS):
        head = reader.head(position)
        if head is None:
            return None
        tag, value, length = head
        if tag in stop_tags:
            return b"".join(elements), position
        end = reader.next_element(value, length, max(tag, previous))
        if end is None:
            return None
        elements.append(reader.written(position, value, end))
        position, previous = end, tag
    return None


class _Reader:
    def __init__(self, content: bytes, implicit: bool, little_endian: bool) -> None:
        self._content = content
        self._implicit = implicit
        self._order = "little" if little_endian else "big"

    def _number(self, position: int, size: int) -> int:
        return int.from_bytes(self._content[position : position + size], self._order)  # type: ignore[arg-type]

    def head(self, position: int) -> tuple[int, int, int] | None:
        """Tag, where the value starts and its written length; None where this is no attribute."""
        if position < 0 or position + 8 > len(self._content):
            return None
        tag = self._number(position, 2) << 16 | self._number(position + 2, 2)
        if self._implicit:
            return tag, position + 8, self._number(position + 4, 4)
        vr = self._content[position + 4 : position + 6]
        if vr not in _VRS:
            return None
        if vr in _LONG_VRS:
            return tag, position + 12, self._number(position + 8, 4)
        return tag, position + 8, self._number(position + 6, 2)

    def next_element(self, value: int, length: int, after: int) -> int | None:
        """Where the next attribute starts that has a known tag above `after`, nearest to where it should."""
        if length == _UNDEFINED_LENGTH:
            return self._sequence_end(value, after)
        expected = value + length
        if self._follows(expected, after):
            return expected
        for distance in range(1, _SEARCH_BYTES):
            for place in (expected - distance, expected + distance):
                if place >= value and self._is_known(place, after):
                    return place
        return None

    def _sequence_end(self, value: int, after: int) -> int | None:
        delimiter = b"".join(part.to_bytes(2, self._order) for part in (0xFFFE, 0xE0DD)) + bytes(4)  # type: ignore[arg-type]
        last = min(len(self._content), value + _SEQUENCE_BYTES)
        place = self._content.find(delimiter, value, last)
        while place >= 0:
            if self._follows(place + 8, after):
                return place + 8
            place = self._content.find(delimiter, place + 8, last)
        # Without its delimiter a sequence ends where an attribute of a higher group starts.
        return next((at for at in range(value, last) if self._is_known(at, after | 0xFFFF)), None)

    def _follows(self, position: int, after: int) -> bool:
        head = self.head(position)
        if head is None or head[0] <= after or head[0] >> 16 > 0x7FE0:
            return False
        # Without a written type any bytes look like an attribute, but few like a known or a private one that ends.
        is_private = head[0] & 0x10000 and head[0] & 0xFFFF >= 0x10
        is_likely = dictionary_has_tag(head[0]) or bool(is_private)
        return not self._implicit or (is_likely and self._ends(head[1], head[2]))

    def _ends(self, value: int, length: int) -> bool:
        return length == _UNDEFINED_LENGTH or value + length <= len(self._content)

    def _is_known(self, position: int, after: int) -> bool:
        head = self.head(position)
        if head is None or head[0] <= after or not dictionary_has_tag(head[0]):
            return False
        if self._implicit:
            return self._ends(head[1], head[2])
        vr = self._content[position + 4 : position + 6].decode("ascii")
        return vr in dictionary_VR(head[0]) or vr == "UN"

    def written(self, position: int, value: int, end: int) -> bytes:
        """The attribute again, with the length that it has."""
        size = end - value
        width = 4 if self._implicit or value - position == 12 else 2
        if size >= 1 << (8 * width):
            return b""
        length = size.to_bytes(width, self._order)  # type: ignore[arg-type]
        return self._content[position : value - width] + length + self._content[value:end]
