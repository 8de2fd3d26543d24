"""A past expert set that a system holds for a caller, so that its answers can be computed again."""

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from echovlm_ray.client.errors import InternalServerError, from_rpc_error
from protos import control_pb2


class HeldSet(Iterator[control_pb2.ReplayState]):
    """The states of a replay, which lasts until the `with` block ends or `cancel` is called.

    After `wait`, requests with this `expert_set_id` are answered. Losing Control ends it.
    """

    def __init__(self, call: Any, address: str, request_id: str) -> None:
        """Takes the call under way; made by `ExpertControlClient.replay`."""
        self._call = call
        self._address = address
        self._request_id = request_id

    def __next__(self) -> control_pb2.ReplayState:
        """The next state, waiting for it.

        Raises:
            NotFoundError: this deployment never served the set.
            FailedPreconditionError: a bundle of it is gone, damaged or not admitted, or it is of another backbone.
            OverloadedError: there is no room beside what is served, or too many replays are held.
            EchoVLMError: the call failed otherwise.
        """
        try:
            state: control_pb2.ReplayState = next(self._call)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._address, self._request_id, service="Control") from None
        return state

    def wait(self, states: Iterator[control_pb2.ReplayState] | None = None) -> None:
        """Returns when requests may name the set; raises what `__next__` raises.

        Args:
            states: what is asked for the states instead of this object, for example one that Ctrl-C interrupts.
        """
        for state in states or self:
            if state.phase == control_pb2.ReplayState.PHASE_READY:
                return
        raise InternalServerError("Control ended the replay without a reason", request_id=self._request_id)

    def cancel(self) -> None:
        """Releases the set."""
        self._call.cancel()

    def __enter__(self) -> Self:
        """The object itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Releases the set."""
        self.cancel()
