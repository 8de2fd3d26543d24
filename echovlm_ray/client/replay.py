"""A replay: a past expert set that is loaded for a caller, so that its answers can be computed again."""

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from echovlm_ray.client.errors import InternalServerError, from_rpc_error
from protos import control_pb2


class ExpertSetReplay(Iterator[control_pb2.ReplayState]):
    """A running replay and its states. It lasts until the `with` block ends or `cancel` is called.

    After `wait`, requests with this `expert_set_id` are answered. If Control is lost, the replay ends.
    """

    def __init__(self, call: Any, address: str, request_id: str) -> None:
        """Made by `ExpertControlClient.replay`, with the running call."""
        self._call = call
        self._address = address
        self._request_id = request_id

    def __next__(self) -> control_pb2.ReplayState:
        """Waits for the next state.

        Raises:
            NotFoundError: this deployment never served the expert set.
            FailedPreconditionError: a bundle of it is missing, damaged or not admitted, or the backbone differs.
            OverloadedError: the replicas' memory does not suffice, or too many replays are running.
            EchoVLMError: the call failed otherwise.
        """
        try:
            state: control_pb2.ReplayState = next(self._call)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._address, self._request_id, service="Control") from None
        return state

    def wait(self, states: Iterator[control_pb2.ReplayState] | None = None) -> None:
        """Returns when the set is loaded. Raises the errors of `__next__`.

        Args:
            states: an iterator to use instead of this object, for example one that Ctrl-C interrupts.
        """
        for state in states or self:
            if state.phase == control_pb2.ReplayState.PHASE_READY:
                return
        raise InternalServerError("Control ended the replay without a reason", request_id=self._request_id)

    def cancel(self) -> None:
        """Ends the replay."""
        self._call.cancel()

    def __enter__(self) -> Self:
        """Returns the object."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the replay."""
        self.cancel()
