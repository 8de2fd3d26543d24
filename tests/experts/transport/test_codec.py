import math
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import InvalidTensorError
from experts.transport import codec
from experts.transport.codec import tensor_from_proto, tensor_to_proto
from protos import tensor_pb2

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8]


def random_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    """Any bit pattern, so NaNs with payloads and infinities too."""
    generator = torch.Generator().manual_seed(seed)
    octets = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return octets.view(dtype).reshape(shape)


def octets(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=5),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_round_trip_keeps_every_bit(dtype: torch.dtype, shape: list[int], seed: int) -> None:
    tensor = random_tensor(dtype, shape, seed)
    message = tensor_pb2.Tensor.FromString(tensor_to_proto(tensor).SerializeToString())
    result = tensor_from_proto(message)
    assert result.dtype == dtype
    assert result.shape == tensor.shape
    assert torch.equal(octets(result), octets(tensor))


def test_any_layout_is_sent_row_major() -> None:
    tensor = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    for view in (tensor.T, tensor[:, ::2], tensor[1:], torch.tensor([7], dtype=torch.int32).expand(5)):
        assert torch.equal(tensor_from_proto(tensor_to_proto(view)), view)


def test_values_are_little_endian() -> None:
    assert tensor_to_proto(torch.tensor([1, 258], dtype=torch.int32)).data == bytes([1, 0, 0, 0, 2, 1, 0, 0])
    message = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_BFLOAT16, shape=[1], data=b"\x80\x3f")
    assert tensor_from_proto(message).item() == 1.0


@pytest.mark.skipif(sys.byteorder == "big", reason="shows on little-endian machines what big-endian ones do")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_big_endian_machine_swaps_bytes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_tensor(dtype, [3, 4], 1)
    plain = tensor_to_proto(tensor).data
    monkeypatch.setattr(codec, "_SWAP_BYTES", True)
    message = tensor_to_proto(tensor)
    size = dtype.itemsize
    assert message.data == b"".join(plain[at : at + size][::-1] for at in range(0, len(plain), size))
    assert torch.equal(octets(tensor_from_proto(message)), octets(tensor))


def test_the_result_is_writable_memory_of_its_own() -> None:
    message = tensor_to_proto(torch.zeros(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = tensor_from_proto(message)
    result.fill_(7)
    assert message.data == bytes(16)


def test_gradients_do_not_stand_in_the_way() -> None:
    assert tensor_to_proto(torch.ones(2, requires_grad=True)).shape == [2]


def test_a_dtype_without_a_place_in_the_protocol_is_refused() -> None:
    with pytest.raises(InvalidTensorError, match=r"float64.*convert it to one of float32"):
        tensor_to_proto(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "reason"),
    [
        (tensor_pb2.DATA_TYPE_UNSPECIFIED, [1], b"\0" * 4, r"x\.dtype is 0"),
        (99, [1], b"\0" * 4, r"x\.dtype is 99"),
        (tensor_pb2.DATA_TYPE_FLOAT32, [-1], b"\0" * 4, "cannot be negative"),
        (tensor_pb2.DATA_TYPE_FLOAT32, [-1, -1], b"\0" * 4, "cannot be negative"),
        (tensor_pb2.DATA_TYPE_FLOAT32, [2**62, 2**62], b"", "at most"),
        (tensor_pb2.DATA_TYPE_FLOAT32, [0, 2**62, 2**62], b"", "at most"),
        (tensor_pb2.DATA_TYPE_UINT8, [2**40], b"", "takes 1099511627776"),
        (tensor_pb2.DATA_TYPE_UINT8, [1] * 9, b"\0", "9 dimensions"),
        (tensor_pb2.DATA_TYPE_FLOAT32, [2], b"\0" * 7, "has 7 bytes.*takes 8"),
        (tensor_pb2.DATA_TYPE_FLOAT32, [2], b"\0" * 9, "has 9 bytes.*takes 8"),
        (tensor_pb2.DATA_TYPE_FLOAT32, [], b"", "takes 4"),
    ],
)
def test_malformed_messages_are_refused(dtype: int, shape: list[int], data: bytes, reason: str) -> None:
    message = tensor_pb2.Tensor(dtype=dtype, shape=shape, data=data)  # type: ignore[arg-type]
    with pytest.raises(InvalidTensorError, match=reason):
        tensor_from_proto(message, "x")
