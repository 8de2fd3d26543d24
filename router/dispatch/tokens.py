"""The tokens of one expert call, and its two encodings: in the message, or in shared memory."""

import logging
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from experts.errors import InvalidTensorError
from experts.transport import wire
from experts.transport.layout import Area, Layout
from experts.transport.shared_memory import SharedMemory
from protos import expert_pb2

logger = logging.getLogger(__name__)

# A few shapes repeat; their views are cached up to this number.
_MAX_VIEWS = 256


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a call. The tensors must not change before the answer, because the call may be retried.

    Attributes:
        row_R: the rows of `x_TD`, in the order of the other two; None for all rows.
        expert_index_RK: int32 or int64.
        weight_RK: in x's dtype.
    """

    bundle_digest: str
    layer: int
    x_TD: torch.Tensor
    row_R: torch.Tensor | None
    expert_index_RK: torch.Tensor
    weight_RK: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens × hidden of the input and of the answer."""
        return self.expert_index_RK.shape[0], self.x_TD.shape[1]

    def message(self, correlation_id: int) -> bytes:
        """The serialised request with the tensors in it."""
        x_RD = self.x_TD if self.row_R is None else self.x_TD[self.row_R]
        return wire.forward_request(
            correlation_id, self.bundle_digest, self.layer, x_RD, self.expert_index_RK, self.weight_RK
        )


@dataclass(frozen=True, slots=True)
class Place:
    """The region of a call in shared memory. It stays reserved as long as this object or its output exists."""

    area: Area
    layout: Layout

    def output_TD(self) -> torch.Tensor:
        """The answer as a view."""
        return self.layout.output_TD(self.area)


@dataclass(frozen=True, slots=True)
class _Views:
    layout: Layout
    hidden_states_TD: torch.Tensor
    expert_index_TK: torch.Tensor
    weight_TK: torch.Tensor
    # The serialised part of the message with their offsets.
    shared: bytes


class TokenWriter:
    """Writes calls to one shared memory. Not thread-safe."""

    def __init__(self, memory: SharedMemory) -> None:
        """Writes nothing yet."""
        self.memory = memory
        self._layouts: dict[Hashable, Layout | None] = {}
        self._views: dict[Hashable, _Views] = {}

    def write(self, tokens: Tokens, correlation_id: int) -> tuple[bytes, Place] | None:
        """Writes the tensors and returns the serialised request and their region; None if they do not fit."""
        kind = (*tokens.shape, tokens.expert_index_RK.shape[1], tokens.x_TD.dtype)
        if kind not in self._layouts:
            self._layouts[kind] = _layout(*kind)
        layout = self._layouts[kind]
        if layout is None:
            return None
        allocated = self.memory.allocate(layout.nbytes)
        if allocated is None:
            if self.memory.budget.warn_once():
                logger.warning(
                    "the memory shared with expert replicas (router.shared_memory_bytes = %d) does not hold all that "
                    "is under way: what does not fit travels in the messages",
                    self.memory.budget.limit_bytes,
                )
            return None
        area, offset = allocated
        views = self._views.get((offset, kind))
        if views is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            views = self._views[offset, kind] = self._make_views(offset, layout)
        x_TD = tokens.x_TD.detach() if tokens.x_TD.requires_grad else tokens.x_TD
        if tokens.row_R is None:
            views.hidden_states_TD.copy_(x_TD)
        elif x_TD.is_cpu:
            torch.index_select(x_TD, 0, tokens.row_R, out=views.hidden_states_TD)
        else:
            views.hidden_states_TD.copy_(x_TD[tokens.row_R])
        views.expert_index_TK.copy_(tokens.expert_index_RK)
        views.weight_TK.copy_(tokens.weight_RK.detach() if tokens.weight_RK.requires_grad else tokens.weight_RK)
        # A new message each time, because a reused one keeps every string that was ever set. The parts of a message may
        # be serialised one by one.
        head = expert_pb2.ForwardRequest(
            correlation_id=correlation_id, bundle_digest=tokens.bundle_digest, layer=tokens.layer
        )
        return head.SerializeToString() + views.shared, Place(area, layout)

    def _make_views(self, offset: int, layout: Layout) -> _Views:
        # Not views of the region, which would keep it reserved.
        stretch = self.memory.stretch(offset, layout.nbytes)
        return _Views(
            layout,
            layout.hidden_states_TD(stretch),
            layout.expert_index_TK(stretch),
            layout.weight_TK(stretch),
            expert_pb2.ForwardRequest(shared=layout.to_proto(offset)).SerializeToString(),
        )


def _layout(tokens: int, hidden_size: int, top_k: int, dtype: torch.dtype) -> Layout | None:
    try:
        return Layout.of(tokens, hidden_size, top_k, dtype)
    except InvalidTensorError:
        # An empty call, or a dtype that the replica refuses with an error.
        return None
