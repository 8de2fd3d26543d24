"""Tensors to and from their protobuf message.

`tensor_to_proto` and `tensor_from_proto` are for any message and copy the data six times in total, including parsing
and serialising. Expert calls use `experts.transport.wire`, which copies it once.
"""

import math
import sys

import torch

from experts.errors import InvalidTensorError
from protos import tensor_pb2

# Limits for tensors of this system: dimensions, and elements with empty dimensions counted as one.
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**40

_DATA_TYPES = {
    torch.float32: tensor_pb2.DATA_TYPE_FLOAT32,
    torch.bfloat16: tensor_pb2.DATA_TYPE_BFLOAT16,
    torch.float16: tensor_pb2.DATA_TYPE_FLOAT16,
    torch.int32: tensor_pb2.DATA_TYPE_INT32,
    torch.int64: tensor_pb2.DATA_TYPE_INT64,
    torch.uint8: tensor_pb2.DATA_TYPE_UINT8,
}
_TORCH_TYPES = {data_type: dtype for dtype, data_type in _DATA_TYPES.items()}
_SWAP_BYTES = sys.byteorder == "big"


def data_type_of(dtype: torch.dtype) -> tensor_pb2.DataType:
    """The protocol's data type of a torch dtype.

    Raises:
        InvalidTensorError: there is none.
    """
    data_type = _DATA_TYPES.get(dtype)
    if data_type is None:
        names = ", ".join(str(known).removeprefix("torch.") for known in _DATA_TYPES)
        raise InvalidTensorError(f"a tensor of {dtype} cannot be sent; convert it to one of {names}")
    return data_type


def torch_type_of(data_type: int, name: str) -> torch.dtype:
    """The torch dtype of a protocol's data type; `name` is the message's field, for the error.

    Raises:
        InvalidTensorError: it is unknown.
    """
    dtype: torch.dtype | None = _TORCH_TYPES.get(data_type)  # type: ignore[call-overload]
    if dtype is None:
        raise InvalidTensorError(f"{name}.dtype is {data_type}, which is no element type of the protocol")
    return dtype


def octets_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor of any shape, layout and device in a message, without a copy if possible."""
    octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if _SWAP_BYTES:
        octets = _swapped(octets, tensor.element_size())
    return octets.numpy().data


def tensor_to_proto(tensor: torch.Tensor) -> tensor_pb2.Tensor:
    """The message of a tensor of any shape, layout and device.

    Raises:
        InvalidTensorError: the protocol does not have the element type.
    """
    return tensor_pb2.Tensor(dtype=data_type_of(tensor.dtype), shape=tensor.shape, data=octets_of(tensor).tobytes())


def tensor_from_proto(message: tensor_pb2.Tensor, name: str = "tensor") -> torch.Tensor:
    """The tensor of a message, copied to new memory on the CPU.

    Args:
        message: the received message.
        name: the message's field, for errors.

    Raises:
        InvalidTensorError: the element type is unknown, the shape is negative or too large, or the number of bytes does
            not match it. Nothing is allocated before these checks.
    """
    # A bytearray, because torch would share the message's read-only bytes and let a kernel write to them.
    return tensor_from_octets(message, bytearray(message.data), name)


def tensor_from_octets(
    message: tensor_pb2.Tensor, octets: bytearray | memoryview, name: str = "tensor"
) -> torch.Tensor:
    """The tensor of a message whose data is passed separately; it shares the memory of the data.

    With read-only memory, the caller must ensure that nothing writes to the tensor.

    Raises:
        InvalidTensorError: see `tensor_from_proto`.
    """
    dtype = torch_type_of(message.dtype, name)
    shape = tuple(message.shape)
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidTensorError(f"{name}.shape has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are allowed")
    if any(size < 0 for size in shape):
        raise InvalidTensorError(f"{name}.shape is {list(shape)}; sizes cannot be negative")
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise InvalidTensorError(f"{name}.shape is {list(shape)}; at most {MAX_ELEMENTS} elements are allowed")
    expected = math.prod(shape) * dtype.itemsize
    if len(octets) != expected:
        raise InvalidTensorError(
            f"{name}.data has {len(octets)} bytes, but shape {list(shape)} of {str(dtype).removeprefix('torch.')} "
            f"takes {expected}"
        )
    if not octets:
        return torch.empty(shape, dtype=dtype)
    if _SWAP_BYTES:
        return _swapped(torch.frombuffer(octets, dtype=torch.uint8), dtype.itemsize).view(dtype).reshape(shape)
    return torch.frombuffer(octets, dtype=dtype).reshape(shape)


def _swapped(octets: torch.Tensor, element_size: int) -> torch.Tensor:
    return octets.reshape(-1, element_size).flip(1).reshape(-1)
