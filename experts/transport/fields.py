"""Iterates over the fields of a serialised protobuf message without parsing it.

Source: https://protobuf.dev/programming-guides/encoding/, the message structure and its wire types.
"""

# Wire types.
_VARINT, _EIGHT_BYTES, _WITH_LENGTH, _FOUR_BYTES = 0, 1, 2, 5
# A varint of 64 bits has at most ten octets of seven bits.
_VARINT_BITS = 70


def next_field(message: bytes, at: int) -> tuple[int, int, int]:
    """Reads the field at an offset.

    Returns:
        its tag (number and wire type), and the start and end of its content. The end may be beyond the message.

    Raises:
        IndexError: the message ends within it, or its wire type is invalid.
    """
    tag, start = read_varint(message, at)
    kind = tag & 7
    if kind == _WITH_LENGTH:
        length, start = read_varint(message, start)
        return tag, start, start + length
    if kind == _VARINT:
        return tag, start, read_varint(message, start)[1]
    if kind == _EIGHT_BYTES:
        return tag, start, start + 8
    if kind == _FOUR_BYTES:
        return tag, start, start + 4
    raise IndexError(at)


def read_varint(message: bytes, at: int) -> tuple[int, int]:
    """Reads the number at an offset and returns it with its end.

    Raises:
        IndexError: the message ends within it, or it is longer than 64 bits.
    """
    value = 0
    for shift in range(0, _VARINT_BITS, 7):
        octet = message[at]
        at += 1
        value |= (octet & 0x7F) << shift
        if octet < 0x80:
            return value, at
    raise IndexError(at)
