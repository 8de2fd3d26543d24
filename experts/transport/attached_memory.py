"""The replica's mapping of the memory that a caller shares with it; see `SharedMemory` in protos/expert.proto."""

import fcntl
import mmap
import os
import stat
from dataclasses import dataclass

import numpy as np
import torch

from experts.errors import InvalidTensorError
from experts.transport.layout import ALIGNMENT, Area, Layout
from protos import expert_pb2

# Limits address space only: the pages count against the caller's limit.
MAX_BYTES = 2**40
# A few shapes repeat; their views are cached up to this number.
_MAX_VIEWS = 256


class AttachError(InvalidTensorError):
    """A caller's descriptor cannot be mapped as shared memory. The text has the reason."""


@dataclass(frozen=True, slots=True)
class SharedViews:
    """The tensors of one call, in the caller's memory."""

    hidden_states_TD: torch.Tensor
    output_TD: torch.Tensor
    expert_index_TK: torch.Tensor
    weight_TK: torch.Tensor


class AttachedMemory:
    """A mapping of a caller's memory. It is unmapped when no view of it is left."""

    def __init__(self, descriptor: int, size: int) -> None:
        """Maps the memory.

        Args:
            descriptor: the caller's descriptor, which is not closed.
            size: the caller's number of bytes.

        Raises:
            AttachError: it is not memory of this user, or its size differs or can change.
        """
        if not 0 < size <= MAX_BYTES:
            raise AttachError(f"size is {size}; it must be above 0 and at most {MAX_BYTES}")
        _check(descriptor, size)
        try:
            mapped = mmap.mmap(descriptor, size)
        except (OSError, ValueError) as error:
            raise AttachError(f"the memory cannot be mapped: {error}") from None
        self.size = size
        self._octets: Area = np.frombuffer(mapped, dtype=np.uint8)
        self._views_of: dict[tuple[int, int, int, int, int], SharedViews] = {}

    def views(self, shared: expert_pb2.SharedTensors) -> SharedViews:
        """The tensors of a call.

        Raises:
            InvalidTensorError: they are not within the memory, or are invalid.
        """
        key = (shared.offset, shared.dtype, shared.tokens, shared.hidden_size, shared.top_k)
        views = self._views_of.get(key)
        if views is None:
            views = self._make_views(shared)
            if len(self._views_of) >= _MAX_VIEWS:
                self._views_of.clear()
            self._views_of[key] = views
        return views

    def _make_views(self, shared: expert_pb2.SharedTensors) -> SharedViews:
        layout = Layout.from_proto(shared)
        start, end = shared.offset, shared.offset + layout.nbytes
        if start % ALIGNMENT or end > self.size:
            raise InvalidTensorError(
                f"shared reaches from {start} to {end}; it must begin at a multiple of {ALIGNMENT} and end within "
                f"{self.size}"
            )
        area = self._octets[start:end]
        return SharedViews(
            layout.hidden_states_TD(area), layout.output_TD(area), layout.expert_index_TK(area), layout.weight_TK(area)
        )


def _check(descriptor: int, size: int) -> None:
    try:
        status = os.fstat(descriptor)
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        # Files on a disk, sockets and pipes have no seals.
        raise AttachError("the descriptor is not of memory made by memfd_create") from None
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise AttachError("the memory belongs to another user")
    if status.st_size != size:
        raise AttachError(f"the memory has {status.st_size} bytes, and the caller says {size}")
    wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    if seals & wanted != wanted:
        raise AttachError("the memory's size is not sealed")
