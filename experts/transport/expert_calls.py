"""One call of an expert group, whichever way it came: checked, computed, answered, counted."""

import logging
import threading
import time
import traceback
from collections.abc import Callable
from typing import Protocol

import torch
from google.rpc import code_pb2, status_pb2

from experts.errors import ExpertCapacityError, InvalidTensorError
from experts.transport import wire
from experts.transport.attached_memory import AttachedMemory
from experts.transport.codec import tensor_from_proto
from protos import expert_pb2

logger = logging.getLogger(__name__)

_INT32_BYTES = 4


class SupportsForward(Protocol):
    """What calls need of an `experts.group.ExpertGroup`."""

    @property
    def organ(self) -> str:
        """Whose experts these are."""

    def forward(
        self,
        digest: str,
        layer: int,
        x_TD: torch.Tensor,
        expert_index_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> torch.Tensor:
        """See `experts.group.ExpertGroup.forward`."""

    def parameters_per_expert(self, digest: str) -> int | None:
        """See `experts.group.ExpertGroup.parameters_per_expert`."""


class ExpertCalls:
    """The calls of a group, over all streams and connections. May be used from any thread."""

    def __init__(
        self, group: SupportsForward, *, to_status: Callable[[Exception], status_pb2.Status], max_queue: int
    ) -> None:
        """See `experts.service.ExpertGroupService`."""
        self.group = group
        self._to_status = to_status
        self._max_queue = max_queue
        self._lock = threading.Lock()
        self._in_flight = 0
        self._received = 0
        self._parameters: dict[str, int] = {}

    @property
    def in_flight(self) -> int:
        """Calls received and not yet answered."""
        return self._in_flight

    @property
    def received(self) -> int:
        """All calls since the start, refused ones too."""
        return self._received

    def begin(self) -> int | None:
        """Counts a call that came; `end` must follow.

        Returns:
            how many were under way before it; None when that is the limit, and then it must be refused.
        """
        with self._lock:
            self._received += 1
            if self._in_flight >= self._max_queue:
                return None
            self._in_flight += 1
            return self._in_flight - 1

    def end(self, _: object = None) -> None:
        """Counts a call that was answered or dropped."""
        with self._lock:
            self._in_flight -= 1

    def multiply_adds(self, request: expert_pb2.ForwardRequest) -> int | None:
        """What it costs to compute; None if the bundle is not resident."""
        digest = request.bundle_digest
        parameters = self._parameters.get(digest)
        if parameters is None:
            parameters = self.group.parameters_per_expert(digest)
            if parameters is None:
                return None
            # Kept though the bundle may be unloaded: what one costs never changes, and they are few.
            self._parameters[digest] = parameters
        if request.HasField("shared"):
            return parameters * request.shared.tokens * request.shared.top_k
        return parameters * len(request.expert_index.data) // _INT32_BYTES

    def compute(
        self, request: expert_pb2.ForwardRequest, data: memoryview | None, memory: AttachedMemory | None = None
    ) -> bytes:
        """The serialised answer to a call, an error among them; raises nothing.

        Args:
            request: as `wire.parse` gave it.
            data: as `wire.parse` gave it.
            memory: what the connection's caller shares.
        """
        try:
            if request.HasField("shared"):
                return self._compute_shared(request, memory)
            x_TD = wire.tensor_of(request.hidden_states, data, "hidden_states")
            expert_index_TK = tensor_from_proto(request.expert_index, "expert_index")
            weight_TK = tensor_from_proto(request.weight, "weight")
            output_TD, compute_ns = self._forward(request, x_TD, expert_index_TK, weight_TK)
            head = expert_pb2.ForwardResponse(correlation_id=request.correlation_id, compute_ns=compute_ns)
            return wire.with_tensor(head, output_TD)
        except Exception as error:
            return self.failure(request, error)

    def refusal(self, request: expert_pb2.ForwardRequest) -> bytes:
        """The answer to a call for which there is no place."""
        reason = (
            f"the expert group of {self.group.organ!r} has {self._in_flight} calls waiting, its limit "
            f"max_queue = {self._max_queue}; send this one again later or to another replica"
        )
        return self.failure(request, ExpertCapacityError(reason))

    def failure(self, request: expert_pb2.ForwardRequest, error: Exception) -> bytes:
        """The answer to a call that failed."""
        status = self._to_status(error)
        if status.code == code_pb2.INTERNAL:
            # The places in the code, not the exception's text: that may show what was computed.
            logger.error(
                "a call with bundle %.64s, layer %d failed: %s\n%s",
                request.bundle_digest,
                request.layer,
                type(error).__name__,
                "".join(traceback.format_tb(error.__traceback__)),
            )
        return expert_pb2.ForwardResponse(correlation_id=request.correlation_id, error=status).SerializeToString()

    def _compute_shared(self, request: expert_pb2.ForwardRequest, memory: AttachedMemory | None) -> bytes:
        if memory is None:
            raise InvalidTensorError("no memory is shared here: send the tensors in the message")
        views = memory.views(request.shared)
        # Copied, because a kernel uses them as addresses after they were checked, and the caller could change them.
        expert_index_TK = views.expert_index_TK.clone()
        output_TD, compute_ns = self._forward(request, views.hidden_states_TD, expert_index_TK, views.weight_TK)
        views.output_TD.copy_(output_TD)
        return expert_pb2.ForwardResponse(
            correlation_id=request.correlation_id, compute_ns=compute_ns, output_in_place=True
        ).SerializeToString()

    def _forward(
        self,
        request: expert_pb2.ForwardRequest,
        x_TD: torch.Tensor,
        expert_index_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> tuple[torch.Tensor, int]:
        started = time.perf_counter_ns()
        output_TD = self.group.forward(request.bundle_digest, request.layer, x_TD, expert_index_TK, weight_TK)
        compute_ns = time.perf_counter_ns() - started
        if output_TD.shape != x_TD.shape or output_TD.dtype != x_TD.dtype:
            raise RuntimeError(f"the kernel made {list(output_TD.shape)} {output_TD.dtype} of {list(x_TD.shape)}")
        return output_TD, compute_ns
