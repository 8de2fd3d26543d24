"""The replica's end of the memory that a caller shares with it; see `SharedMemory` in protos/expert.proto."""

import fcntl
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from experts.errors import InvalidTensorError
from experts.transport.layout import ALIGNMENT, HEADER_BYTES, Area, Layout
from experts.transport.shared_memory import NAME_PREFIX, TOKEN_BYTES
from protos import expert_pb2

# Only addresses: the caller's pages count against the caller's own limit.
MAX_BYTES = 2**40
# The same few exchanges come again and again; their views are kept until there are so many.
_MAX_KEPT = 256


class AttachError(InvalidTensorError):
    """What a caller offered is not memory that can be shared. The text says why, without naming a path."""


@dataclass(frozen=True, slots=True)
class SharedViews:
    """The tensors of one exchange, in the caller's memory."""

    hidden_states_TD: torch.Tensor
    output_TD: torch.Tensor
    expert_index_TK: torch.Tensor
    weight_TK: torch.Tensor


class AttachedMemory:
    """A caller's memory, mapped here. It goes when no view of it is left."""

    def __init__(self, offer: expert_pb2.SharedMemory) -> None:
        """Maps it, after looking at all that the caller says of it.

        Raises:
            AttachError: it is not memory of a process of this user on this host, or not as the contract says.
        """
        if not HEADER_BYTES < offer.size <= MAX_BYTES:
            raise AttachError(f"size is {offer.size}; it must be above {HEADER_BYTES} and at most {MAX_BYTES}")
        if len(offer.token) != TOKEN_BYTES:
            raise AttachError(f"token has {len(offer.token)} bytes; it must have {TOKEN_BYTES}")
        descriptor = _open(offer)
        try:
            _check(descriptor, offer)
            mapped = mmap.mmap(descriptor, offer.size)
        except OSError as error:
            raise AttachError(f"the memory cannot be mapped: {error.strerror}") from None
        finally:
            os.close(descriptor)
        if mapped[:TOKEN_BYTES] != offer.token:
            raise AttachError("the token is not in the memory: it is another process's")
        self.size = offer.size
        self._octets: Area = np.frombuffer(mapped, dtype=np.uint8)
        self._kept: dict[tuple[int, int, int, int, int], SharedViews] = {}

    def views(self, shared: expert_pb2.SharedTensors) -> SharedViews:
        """The tensors of an exchange.

        Raises:
            InvalidTensorError: they are not all inside the memory, or are none that can be computed with.
        """
        key = (shared.offset, shared.dtype, shared.tokens, shared.hidden_size, shared.top_k)
        views = self._kept.get(key)
        if views is None:
            views = self._views(shared)
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            self._kept[key] = views
        return views

    def _views(self, shared: expert_pb2.SharedTensors) -> SharedViews:
        layout = Layout.from_proto(shared)
        start, end = shared.offset, shared.offset + layout.nbytes
        if start < HEADER_BYTES or start % ALIGNMENT or end > self.size:
            raise InvalidTensorError(
                f"shared reaches from {start} to {end}; it must begin at a multiple of {ALIGNMENT} that is at least "
                f"{HEADER_BYTES}, and end within {self.size}"
            )
        area = self._octets[start:end]
        return SharedViews(
            layout.hidden_states_TD(area), layout.output_TD(area), layout.expert_index_TK(area), layout.weight_TK(area)
        )


def _open(offer: expert_pb2.SharedMemory) -> int:
    # Two numbers make the path, so it leads nowhere else; and the link is read before it is followed, so that nothing
    # is opened that does something when it is.
    path = Path("/proc") / str(offer.process_id) / "fd" / str(offer.descriptor)
    try:
        if not str(path.readlink()).startswith(f"/memfd:{NAME_PREFIX}"):
            raise AttachError("the descriptor is no memory of this protocol")
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise AttachError(f"the caller's memory cannot be seen from here: {error.strerror}") from None


def _check(descriptor: int, offer: expert_pb2.SharedMemory) -> None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise AttachError("the memory belongs to another user")
    if status.st_size != offer.size:
        raise AttachError(f"the memory has {status.st_size} bytes, and the caller says {offer.size}")
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & seals != seals:
        raise AttachError("the memory's size is not sealed")
