"""Serialises the messages of expert calls with fewer copies, by appending their large tensor directly.

Protobuf would copy a tensor's bytes into a bytes object, into the message, and into the serialised message. The
tensor's field and its `data` have the highest field numbers, so a serialised message is the other fields, a few bytes,
and then the data, and can be joined once. Received messages are read in place in the same way; messages with another
order of fields are parsed by protobuf.
"""

import warnings
from typing import TypeVar

import torch
from google.protobuf.message import DecodeError

from experts.transport.codec import (
    data_type_of,
    octets_of,
    tensor_from_octets,
    tensor_from_proto,
    tensor_to_proto,
)
from experts.transport.fields import next_field
from protos import expert_pb2, tensor_pb2

# The tag of field 15 with a length, in ForwardRequest, ForwardResponse and Tensor.
_TAG = b"\x7a"
# Scanning a smaller message takes longer than copying it.
_SMALL = 16 * 1024
# The limit of a message without the data of its field 15: experts and weights of two million pairs. A few bytes of it
# can take much memory when parsed, so it is limited before protobuf parses it.
MAX_HEAD_BYTES = 16 * 1024 * 1024
# The limit of the number of fields: each occurs once, plus the type and shape of the tensor in field 15.
_MAX_FIELDS = 64
_MAX_TENSOR_HEAD_BYTES = 1024

with warnings.catch_warnings():
    # torch warns once that it shares read-only memory: see `tensor_from_octets`.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)

Message = TypeVar("Message", expert_pb2.ForwardRequest, expert_pb2.ForwardResponse)


def with_tensor(head: expert_pb2.ForwardRequest | expert_pb2.ForwardResponse, tensor: torch.Tensor) -> bytes:
    """Serialises a message with `tensor` as its field 15: `hidden_states` or `output`.

    Raises:
        InvalidTensorError: the element type has no place in the protocol.
    """
    octets = octets_of(tensor)
    field = tensor_pb2.Tensor(dtype=data_type_of(tensor.dtype), shape=tensor.shape).SerializeToString()
    field += _TAG + _varint(len(octets))
    return b"".join((head.SerializeToString(), _TAG, _varint(len(field) + len(octets)), field, octets))


def forward_request(
    correlation_id: int,
    bundle_digest: str,
    layer: int,
    x_TD: torch.Tensor,
    expert_index_TK: torch.Tensor,
    weight_TK: torch.Tensor,
) -> bytes:
    """The serialised request of a call with its tensors.

    Args:
        correlation_id: returned with the answer.
        bundle_digest: the bundle.
        layer: the decoder layer, from 0.
        x_TD: tokens × hidden, in the dtype of the hidden states.
        expert_index_TK: int32 or int64.
        weight_TK: in x's dtype.

    Raises:
        InvalidTensorError: the element type has no place in the protocol.
    """
    head = expert_pb2.ForwardRequest(
        correlation_id=correlation_id,
        bundle_digest=bundle_digest,
        layer=layer,
        expert_index=tensor_to_proto(expert_index_TK.to(torch.int32)),
        weight=tensor_to_proto(weight_TK),
    )
    return with_tensor(head, x_TD)


def parse(message_type: type[Message], message: bytes) -> tuple[Message, memoryview | None]:
    """Parses a message, if possible without the data of its field 15.

    Hostile bytes take no more time than a valid message of the same length, and little more memory: a few fields are
    scanned here, and protobuf parses at most `MAX_HEAD_BYTES`.

    Returns:
        the message, and the omitted data as a view of the argument, or None if the message is complete.

    Raises:
        DecodeError: it is not such a message, or has more than `MAX_HEAD_BYTES` before the data of a final field 15.
    """
    start = _large_field(message, 0, len(message)) if len(message) > _SMALL else None
    if start is not None and start[0] <= MAX_HEAD_BYTES:
        data = _large_field(message, start[1], len(message))
        if data is not None and data[0] - start[1] <= _MAX_TENSOR_HEAD_BYTES:
            head = message_type.FromString(message[: start[0]])
            field = head.hidden_states if isinstance(head, expert_pb2.ForwardRequest) else head.output
            field.MergeFromString(message[start[1] : data[0]])
            return head, memoryview(message)[data[1] :]
    if len(message) > MAX_HEAD_BYTES:
        raise DecodeError("a large message must end with its tensor, and the tensor with its data")
    return message_type.FromString(message), None


def tensor_of(field: tensor_pb2.Tensor, data: memoryview | None, name: str) -> torch.Tensor:
    """The tensor of a message's field 15, from the result of `parse`. It must not be written to.

    Raises:
        InvalidTensorError: as in `experts.transport.codec.tensor_from_proto`.
    """
    return tensor_from_proto(field, name) if data is None else tensor_from_octets(field, data, name)


def _large_field(message: bytes, at: int, end: int) -> tuple[int, int] | None:
    """The start of field 15 and of its content; None unless it is the last field and extends to the end."""
    try:
        for _ in range(_MAX_FIELDS):
            if at >= end:
                return None
            start = at
            tag, content, at = next_field(message, start)
            if tag == _TAG[0]:
                return (start, content) if at == end else None
    except IndexError:
        return None
    return None


def _varint(value: int) -> bytes:
    octets = bytearray()
    while value >= 0x80:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)


__all__ = ["DecodeError", "forward_request", "parse", "tensor_of", "with_tensor"]
