"""Tensors to and from their protobuf message.

Copies of the data: `tensor_to_proto` makes two (into a bytes object, and into the message), serialising makes one
more; parsing makes one, and `tensor_from_proto` makes two (out of the message, and into memory that a kernel may
write to).
"""

import math
import sys

import torch

from experts.errors import InvalidTensorError
from protos import tensor_pb2

# More dimensions, or more elements once the empty dimensions count as one, is no tensor of this system.
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


def tensor_to_proto(tensor: torch.Tensor) -> tensor_pb2.Tensor:
    """The message of a tensor of any shape, layout and device.

    Raises:
        InvalidTensorError: the element type has no place in the protocol.
    """
    data_type = _DATA_TYPES.get(tensor.dtype)
    if data_type is None:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DATA_TYPES)
        raise InvalidTensorError(f"a tensor of {tensor.dtype} cannot be sent; convert it to one of {names}")
    octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if _SWAP_BYTES:
        octets = _swapped(octets, tensor.element_size())
    return tensor_pb2.Tensor(dtype=data_type, shape=tensor.shape, data=octets.numpy().tobytes())


def tensor_from_proto(message: tensor_pb2.Tensor, name: str = "tensor") -> torch.Tensor:
    """The tensor of a message, in memory of its own on the CPU.

    Args:
        message: what arrived.
        name: the message's field, for errors.

    Raises:
        InvalidTensorError: unknown element type, negative or absurd shape, or not exactly as many bytes as the shape
            takes; nothing is allocated before that is known.
    """
    dtype = _TORCH_TYPES.get(message.dtype)
    if dtype is None:
        raise InvalidTensorError(f"{name}.dtype is {message.dtype}, which is no element type of the protocol")
    shape = tuple(message.shape)
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidTensorError(f"{name}.shape has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are allowed")
    if any(size < 0 for size in shape):
        raise InvalidTensorError(f"{name}.shape is {list(shape)}; sizes cannot be negative")
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise InvalidTensorError(f"{name}.shape is {list(shape)}; at most {MAX_ELEMENTS} elements are allowed")
    data = message.data
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise InvalidTensorError(
            f"{name}.data has {len(data)} bytes, but shape {list(shape)} of {str(dtype).removeprefix('torch.')} "
            f"takes {expected}"
        )
    if not data:
        return torch.empty(shape, dtype=dtype)
    if _SWAP_BYTES:
        return _swapped(torch.frombuffer(bytearray(data), dtype=torch.uint8), dtype.itemsize).view(dtype).reshape(shape)
    # A bytearray, not the message's read-only bytes: torch would share those and let a kernel write into them.
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def _swapped(octets: torch.Tensor, element_size: int) -> torch.Tensor:
    return octets.reshape(-1, element_size).flip(1).reshape(-1)
