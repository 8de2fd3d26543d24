"""The layout of one expert call's tensors in shared memory; see `SharedTensors` in protos/expert.proto."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from experts.errors import InvalidTensorError
from experts.transport.codec import data_type_of, torch_type_of
from protos import expert_pb2

# A range of memory, as bytes.
Area = np.ndarray[tuple[int], np.dtype[np.uint8]]

ALIGNMENT = 64
_FLOATING_POINT = frozenset({torch.float32, torch.bfloat16, torch.float16})
_INDEX_TYPE = torch.int32


@dataclass(frozen=True, slots=True)
class Layout:
    """The sizes of a call and the offsets of its tensors, relative to the beginning of its area."""

    tokens: int
    hidden_size: int
    top_k: int
    dtype: torch.dtype
    output_offset: int
    index_offset: int
    weight_offset: int
    nbytes: int

    @classmethod
    def of(cls, tokens: int, hidden_size: int, top_k: int, dtype: torch.dtype) -> Self:
        """Lays out a call.

        Raises:
            InvalidTensorError: a size is 0, or the dtype is not supported.
        """
        if not (tokens > 0 and hidden_size > 0 and top_k > 0):
            raise InvalidTensorError(
                f"shared has {tokens} tokens, hidden_size {hidden_size}, top_k {top_k}; all must be at least 1"
            )
        if dtype not in _FLOATING_POINT:
            raise InvalidTensorError(f"shared.dtype is {dtype}, which is no floating point type of the protocol")
        output = _aligned(tokens * hidden_size * dtype.itemsize)
        index = 2 * output
        weight = index + _aligned(tokens * top_k * _INDEX_TYPE.itemsize)
        nbytes = weight + _aligned(tokens * top_k * dtype.itemsize)
        return cls(tokens, hidden_size, top_k, dtype, output, index, weight, nbytes)

    @classmethod
    def from_proto(cls, shared: expert_pb2.SharedTensors) -> Self:
        """The layout in a message.

        Raises:
            InvalidTensorError: as in `of`, or the dtype is unknown.
        """
        return cls.of(shared.tokens, shared.hidden_size, shared.top_k, torch_type_of(shared.dtype, "shared"))

    def to_proto(self, offset: int) -> expert_pb2.SharedTensors:
        """The message for an area at `offset`."""
        return expert_pb2.SharedTensors(
            offset=offset,
            dtype=data_type_of(self.dtype),
            tokens=self.tokens,
            hidden_size=self.hidden_size,
            top_k=self.top_k,
        )

    def hidden_states_TD(self, area: Area) -> torch.Tensor:
        """The tokens, at the beginning of an area."""
        return _view(area, 0, self.dtype, self.tokens, self.hidden_size)

    def output_TD(self, area: Area) -> torch.Tensor:
        """The answer in an area."""
        return _view(area, self.output_offset, self.dtype, self.tokens, self.hidden_size)

    def expert_index_TK(self, area: Area) -> torch.Tensor:
        """The chosen experts in an area: int32."""
        return _view(area, self.index_offset, _INDEX_TYPE, self.tokens, self.top_k)

    def weight_TK(self, area: Area) -> torch.Tensor:
        """The weights of the pairs in an area."""
        return _view(area, self.weight_offset, self.dtype, self.tokens, self.top_k)


def _view(area: Area, offset: int, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    # torch keeps the array alive, but not its base: `SharedMemory` relies on that.
    return torch.frombuffer(area, dtype=dtype, count=rows * columns, offset=offset).view(rows, columns)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
