import tracemalloc

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import InvalidTensorError
from experts.transport import fields, wire
from experts.transport.codec import tensor_from_proto, tensor_to_proto
from experts.transport.wire import MAX_HEAD_BYTES, parse, tensor_of, with_tensor
from protos import expert_pb2, tensor_pb2

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def head(correlation_id: int = 7, digest: str = "d" * 64) -> expert_pb2.ForwardRequest:
    return expert_pb2.ForwardRequest(
        correlation_id=correlation_id,
        bundle_digest=digest,
        layer=3,
        expert_index=tensor_to_proto(torch.tensor([[0], [-1]], dtype=torch.int32)),
        weight=tensor_to_proto(torch.ones(2, 1)),
    )


@settings(max_examples=60, deadline=None)
@given(
    correlation_id=st.integers(0, 2**64 - 1),
    digest=st.text(max_size=300),
    rows=st.integers(0, 40),
    columns=st.sampled_from([1, 63, 64, 1000]),
    dtype=st.sampled_from(DTYPES),
)
def test_what_is_written_by_hand_is_what_protobuf_writes(
    correlation_id: int, digest: str, rows: int, columns: int, dtype: torch.dtype
) -> None:
    x_TD = torch.randn(rows, columns).to(dtype)
    written = with_tensor(head(correlation_id, digest), x_TD)
    plain = head(correlation_id, digest)
    plain.hidden_states.CopyFrom(tensor_to_proto(x_TD))
    assert expert_pb2.ForwardRequest.FromString(written) == plain
    for message in (written, plain.SerializeToString()):
        request, data = parse(expert_pb2.ForwardRequest, message)
        assert (request.correlation_id, request.bundle_digest, request.layer) == (correlation_id, digest, 3)
        assert torch.equal(tensor_from_proto(request.expert_index), torch.tensor([[0], [-1]], dtype=torch.int32))
        assert torch.equal(tensor_of(request.hidden_states, data, "x"), x_TD)


def test_a_large_tensor_is_not_copied_when_it_arrives() -> None:
    x_TD = torch.randn(64, 128)
    message = with_tensor(expert_pb2.ForwardResponse(correlation_id=1, compute_ns=5), x_TD)
    response, data = parse(expert_pb2.ForwardResponse, message)
    assert data is not None
    assert data.obj is message
    assert not response.output.data
    output_TD = tensor_of(response.output, data, "output")
    start = torch.frombuffer(message, dtype=torch.uint8).data_ptr()
    assert output_TD.data_ptr() == start + len(message) - x_TD.nbytes


def test_other_orders_of_fields_are_understood() -> None:
    x_TD = torch.randn(64, 128)
    field = tensor_to_proto(x_TD).SerializeToString()
    tensor_first = expert_pb2.ForwardResponse(output=tensor_to_proto(x_TD)).SerializeToString()
    rest = expert_pb2.ForwardResponse(correlation_id=9).SerializeToString()
    data_first = tensor_pb2.Tensor(data=tensor_to_proto(x_TD).data).SerializeToString()
    shape_last = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=x_TD.shape).SerializeToString()
    reordered = expert_pb2.ForwardResponse(correlation_id=9).SerializeToString()
    content = data_first + shape_last
    reordered += (
        b"\x7a" + bytes([len(content) & 127 | 128, len(content) >> 7 & 127 | 128, len(content) >> 14]) + content
    )
    twice = rest + expert_pb2.ForwardResponse(output=tensor_pb2.Tensor(shape=[1])).SerializeToString() + tensor_first
    for message in (tensor_first + rest, reordered):
        response, data = parse(expert_pb2.ForwardResponse, message)
        assert response.correlation_id == 9
        assert torch.equal(tensor_of(response.output, data, "output"), x_TD)
    # Protobuf joins a field that comes twice; so the shape has one number too many here.
    response, data = parse(expert_pb2.ForwardResponse, twice)
    assert list(response.output.shape) == [1, 64, 128]
    assert len(field) > 64 * 128 * 4
    with pytest.raises(InvalidTensorError, match=r"takes \d+"):
        tensor_of(tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[3]), memoryview(bytes(8)), "output")


@settings(max_examples=200, deadline=None)
@given(noise=st.binary(max_size=60), at=st.integers(0, 400), cut=st.integers(0, 20_000), whole=st.booleans())
def test_damaged_messages_are_refused_or_read_as_protobuf_reads_them(
    noise: bytes, at: int, cut: int, whole: bool
) -> None:
    message = with_tensor(head(), torch.zeros(40, 128))
    damaged = message[:at] + noise + message[at + len(noise) :]
    damaged = damaged if whole else damaged[: len(damaged) - cut]
    try:
        expected = expert_pb2.ForwardRequest.FromString(damaged)
    except DecodeError:
        expected = None
    try:
        found, data = parse(expert_pb2.ForwardRequest, damaged)
    except DecodeError:
        assert expected is None
        return
    assert expected is not None
    if data is not None:
        found.hidden_states.data = bytes(data)
    assert found == expected


LARGE = 2 * MAX_HEAD_BYTES
# Field 4, a Tensor, whose field 2 is a packed shape: each byte of it stands for eight in memory.
SHAPE = b"\x12" + wire._varint(LARGE) + bytes(LARGE)
HOSTILE = {
    "zeros": bytes(LARGE),
    "small fields without end": b"\x08\x01" * (LARGE // 2),
    "unknown fields without end": b"\xf8\x07\x01" * (LARGE // 3),
    "a shape without end": b"\x22" + wire._varint(len(SHAPE)) + SHAPE,
    "a shape without end in the tensor": b"\x7a" + wire._varint(len(SHAPE) + 2) + SHAPE + b"\x7a\x00",
    "small fields in the tensor": b"\x7a" + wire._varint(LARGE) + b"\x08\x01" * (LARGE // 2),
    "a long head": b"\x12" + wire._varint(LARGE) + bytes(LARGE) + b"\x7a\x02\x7a\x00",
}


@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_messages_are_refused_before_they_cost_time_or_memory(
    message: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    plain = fields.read_varint

    def counted(message: bytes, at: int) -> tuple[int, int]:
        read.append(at)
        return plain(message, at)

    monkeypatch.setattr(fields, "read_varint", counted)
    tracemalloc.start()
    with pytest.raises(DecodeError, match="must end with its tensor"):
        parse(expert_pb2.ForwardRequest, message)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(read) < 1000
    assert peak < 1_000_000
