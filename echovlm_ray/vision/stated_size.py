"""The number of bytes in a video container's header: a file with fewer bytes is truncated, even if it can be played."""

# Sizes of a live recording, which was never closed, have no bit that is zero (Matroska) or are zero (AVI).
_SEGMENT = b"\x18\x53\x80\x67"
# Where the segment begins: behind a header of some dozen bytes.
_SEGMENT_WITHIN = 4096
_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_PROPERTIES_WITHIN = 65536
# Of a packet, and where the first begins (`kinds` knows streams by the same).
_PACKETS = ((188, 0), (192, 4), (204, 0))
_SYNC = b"\x47"


def is_cut_short(content: bytes, kind: str) -> bool:
    """Whether a file has fewer bytes than it declares; False if its kind does not declare a size.

    AVI: the size of its RIFF list. Matroska: that of its segment (RFC 8794, RFC 9559). WMV: the field of its file
    properties (ASF 3.2). MPEG transport stream: its packets are of one size (ISO 13818-1).

    Args:
        content: the whole file.
        kind: one of `kinds.VIDEOS`.
    """
    if kind == "MPEG transport stream":
        return _ends_in_a_packet(content)
    stated = {"AVI": _avi, "Matroska": _matroska, "WMV": _asf}.get(kind, _unstated)(content)
    return stated is not None and len(content) < stated


def _ends_in_a_packet(content: bytes) -> bool:
    for size, first in _PACKETS:
        if all(content[first + number * size : first + number * size + 1] == _SYNC for number in range(3)):
            rest = (len(content) - first) % size
            # What follows the last packet and is none, as a byte that makes a length even, is not missing anything.
            return rest > 0 and content[len(content) - rest : len(content) - rest + 1] == _SYNC
    return False


def _unstated(content: bytes) -> int | None:
    return None


def _avi(content: bytes) -> int | None:
    # The size is that of what follows it; some writers give the whole file's.
    size = int.from_bytes(content[4:8], "little")
    return size if 0 < size < 2**32 - 1 else None


def _matroska(content: bytes) -> int | None:
    place = content.find(_SEGMENT, 0, _SEGMENT_WITHIN)
    if place < 0 or place + 5 > len(content):
        return None
    start = place + len(_SEGMENT)
    length = 9 - content[start].bit_length()
    if length > 8:
        return None
    unknown = (1 << 7 * length) - 1
    size = int.from_bytes(content[start : start + length], "big") & unknown
    return None if size == unknown else start + length + size


def _asf(content: bytes) -> int | None:
    place = content.find(_FILE_PROPERTIES, 0, _PROPERTIES_WITHIN)
    if place < 0:
        return None
    # Behind identifier and size of the object, and the identifier of the file.
    size = int.from_bytes(content[place + 40 : place + 48], "little")
    # A live stream, whose size has no meaning.
    is_live = content[place + 88 : place + 89] != b"" and content[place + 88] & 1
    return None if is_live or not size else size
