"""An expert call that was sent to a replica and is not answered yet."""

from collections.abc import Callable

import torch

from experts.transport import wire
from protos import expert_pb2
from router.dispatch.links import Link
from router.dispatch.tokens import Place, Tokens


class ReplicaLostError(ConnectionError):
    """The connection to a replica failed before a call was answered. The text has the reason."""


class PendingCall:
    """A call to a replica until it is answered.

    Attributes:
        correlation_id: the id of the call on its channel.
        tokens: the tokens of the call.
        link: the link on which it was sent.
        place: its region in shared memory, if it has one. Kept until the answer, because the replica writes there.
        deadline: when the replica counts as lost, in `time.monotonic` seconds.
    """

    __slots__ = ("_data", "_response", "_wait", "correlation_id", "deadline", "link", "place", "tokens")

    def __init__(
        self,
        wait: Callable[["PendingCall"], None],
        correlation_id: int,
        tokens: Tokens,
        link: Link,
        place: Place | None,
        *,
        deadline: float,
    ) -> None:
        """Made by the channel; `wait` is the channel's."""
        self.correlation_id = correlation_id
        self.tokens = tokens
        self.link = link
        self.place = place
        self.deadline = deadline
        self._wait = wait
        self._response: expert_pb2.ForwardResponse | None = None
        self._data: memoryview | None = None

    def answered(self) -> bool:
        """Whether the response has arrived."""
        return self._response is not None

    def answer(self, response: expert_pb2.ForwardResponse, data: memoryview | None) -> None:
        """Sets the response; called by the channel."""
        self._response, self._data = response, data

    def response(self) -> expert_pb2.ForwardResponse:
        """Waits for the response.

        Raises:
            ReplicaLostError: the channel failed first.
        """
        if self._response is None:
            self._wait(self)
        assert self._response is not None
        return self._response

    def output_TD(self) -> torch.Tensor:
        """The output in a successful response, as a view of the received memory.

        Raises:
            InvalidTensorError: the response's tensor is malformed.
        """
        assert self._response is not None
        if self._response.output_in_place and self.place is not None:
            return self.place.output_TD()
        return wire.tensor_of(self._response.output, self._data, "output")
