"""Encapsulated pixel data to the codestreams of their frames (DICOM PS3.5 A.4).

Offset tables, lengths and the number of frames may be wrong or missing; where a codestream starts is known from its
first bytes.
"""

from dataclasses import dataclass

from echovlm_ray.vision.codestream import END_BYTES, END_MARKER, is_ended, starts_codestream
from echovlm_ray.vision.dicom.errors import FrameError

ITEM = b"\xfe\xff\x00\xe0"
DELIMITER = b"\xfe\xff\xdd\xe0"
_ITEM_HEADER = 8
# A wrong length of an item is wrong by a few bytes.
_NEARBY_BYTES = 4
_MAX_ITEMS = 200_000


@dataclass(frozen=True, slots=True)
class Fragment:
    """One item of encapsulated pixel data.

    Attributes:
        start: offset of its header behind the offset table, as offset tables count.
        data: its value.
        is_whole: False where the file ends before the item does.
    """

    start: int
    data: memoryview
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Encapsulated:
    """The items of encapsulated pixel data.

    Attributes:
        offsets: the basic offset table.
        fragments: the items behind it.
        is_ended: whether a delimiter ends them.
        has_wrong_lengths: whether an item was longer or shorter than written.
    """

    offsets: tuple[int, ...]
    fragments: tuple[Fragment, ...]
    is_ended: bool
    has_wrong_lengths: bool


def is_encapsulated(content: bytes, start: int) -> bool:
    """Whether the pixel data that start here consist of items, independent of the transfer syntax."""
    if content[start : start + 4] != ITEM:
        return False
    value = start + _ITEM_HEADER
    length = int.from_bytes(content[start + 4 : value], "little")
    return _is_boundary(content, value + length) or starts_frame(content[value : value + 64])


def starts_frame(data: bytes) -> bool:
    """Whether a compressed frame starts here; `data` are its first 64 bytes or more."""
    return starts_codestream(data) or starts_rle(data)


def starts_rle(data: bytes) -> bool:
    """Whether this is the header of an RLE frame: the number of segments and where they start (PS3.5 G.5)."""
    if len(data) < 64:
        return False
    count, *offsets = (int.from_bytes(data[at : at + 4], "little") for at in range(0, 64, 4))
    used, unused = offsets[:count], offsets[count:]
    return 1 <= count <= 15 and used[0] == 64 and used == sorted(set(used)) and not any(unused)


def read_items(content: bytes, start: int) -> Encapsulated:
    """Takes the items apart that start here.

    Raises:
        FrameError: there are more than any cine loop has.
    """
    items: list[Fragment] = []
    position, behind_table, wrong = start, start, False
    while content[position : position + 4] == ITEM and position + _ITEM_HEADER <= len(content):
        value = position + _ITEM_HEADER
        end = value + int.from_bytes(content[position + 4 : value], "little")
        if end != len(content) and not _is_boundary(content, end):
            found = _boundary(content, value, end)
            wrong = wrong or found is not None
            end = end if found is None else found
        data = memoryview(content)[value : min(end, len(content))]
        items.append(Fragment(position - behind_table, data, is_whole=end <= len(content)))
        if len(items) == 1:
            behind_table = end
        if len(items) > _MAX_ITEMS:
            raise FrameError
        position = end
    ended = content[position : position + 4] == DELIMITER
    if not items or starts_frame(bytes(items[0].data[:64])):
        # The offset table, which may be empty but must be there, is missing.
        return Encapsulated((), tuple(items), ended, wrong)
    table = bytes(items[0].data)
    offsets = tuple(int.from_bytes(table[at : at + 4], "little") for at in range(0, len(table) - 3, 4))
    return Encapsulated(offsets, tuple(item for item in items[1:] if len(item.data)), ended, wrong)


def _is_boundary(content: bytes, position: int) -> bool:
    return position == len(content) or content[position : position + 4] in (ITEM, DELIMITER)


def _boundary(content: bytes, value: int, expected: int) -> int | None:
    """Where an item really ends: at the tag nearest to its written end, else at the next frame at all."""
    for distance in range(1, _NEARBY_BYTES + 1):
        for place in (expected - distance, expected + distance):
            if value <= place < len(content) and _is_boundary(content, place):
                return place
    place = content.find(ITEM, value if expected > len(content) else expected)
    return place if place >= 0 and starts_frame(content[place + _ITEM_HEADER : place + _ITEM_HEADER + 64]) else None


def group_frames(
    encapsulated: Encapsulated, stated: int | None, extended_offsets: tuple[int, ...]
) -> tuple[list[tuple[Fragment, ...]], bool]:
    """The fragments of each frame.

    Args:
        encapsulated: the items.
        stated: Number of Frames, if valid.
        extended_offsets: the Extended Offset Table, empty without one.

    Returns:
        also whether an offset table said so.
    """
    fragments = encapsulated.fragments
    beginnings = [index for index, item in enumerate(fragments) if starts_frame(bytes(item.data[:64]))]
    by_start = {item.start: index for index, item in enumerate(fragments)}
    for offsets in (extended_offsets, encapsulated.offsets):
        indices = [by_start[offset] for offset in offsets if offset in by_start]
        is_sound = len(indices) == len(offsets) > 0 and indices == sorted(set(indices)) and indices[0] == 0
        if is_sound and len(indices) >= len(beginnings):
            return _split(fragments, indices), True
    if not beginnings:
        return ([(fragment,) for fragment in fragments] if stated != 1 else [fragments]), False
    if stated is not None and stated > len(beginnings) == len(fragments) == 1:
        return _concatenated(fragments[0], stated), False
    if len(fragments) == stated:
        beginnings = _with_damaged(fragments, set(beginnings))
    return _split(fragments, [0, *(index for index in beginnings if index)]), False


def _with_damaged(fragments: tuple[Fragment, ...], beginnings: set[int]) -> list[int]:
    """Where frames begin if each fragment may be one: also at a fragment that does not continue the frame before."""
    found, is_open = [], False
    for index, fragment in enumerate(fragments):
        if index in beginnings:
            # The frames of RLE have no end marker, and none of them has several fragments.
            is_open = not starts_rle(bytes(fragment.data[:64]))
        if index in beginnings or not is_open:
            found.append(index)
        is_open = is_open and not is_ended(bytes(fragment.data[-END_BYTES:]))
    return found


def _split(fragments: tuple[Fragment, ...], starts: list[int]) -> list[tuple[Fragment, ...]]:
    ends = [*starts[1:], len(fragments)]
    return [fragments[start:end] for start, end in zip(starts, ends, strict=True)]


def _concatenated(fragment: Fragment, stated: int) -> list[tuple[Fragment, ...]]:
    """Codestreams that were written one behind the other into a single item."""
    data = bytes(fragment.data)
    starts, place = [0], data.find(END_MARKER)
    while place >= 0 and len(starts) < stated:
        start = place + 2
        while data[start : start + 1] == b"\0":
            start += 1
        if starts_codestream(data[start : start + 16]):
            starts.append(start)
        place = data.find(END_MARKER, place + 2)
    ends = [*starts[1:], len(data)]
    return [
        (Fragment(start, fragment.data[start:end], fragment.is_whole or end < len(data)),)
        for start, end in zip(starts, ends, strict=True)
    ]


def joined(fragments: tuple[Fragment, ...]) -> bytes:
    """The codestream of a frame."""
    return b"".join(fragment.data for fragment in fragments)
