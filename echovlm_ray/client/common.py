"""What the client for ordinary Python and the one for asyncio have in common: everything that does not wait."""

from echovlm_ray.client.arguments import timeout
from echovlm_ray.client.connection import TLS, check_connection
from echovlm_ray.client.errors import InternalServerError
from echovlm_ray.client.retries import Retries, Waiting
from echovlm_ray.client.types import Event, Summary, event_from_proto
from echovlm_ray.events import Accepted
from protos import echovlm_pb2


class AnswerState:
    """What a stream has said so far.

    Attributes:
        accepted: the first event.
        summary: the last one.
    """

    def __init__(self, address: str, request_id: str) -> None:
        self.request_id = request_id
        self.accepted: Accepted | None = None
        self.summary: Summary | None = None
        self._address = address
        # Nothing is sent again from then on.
        self._begun = False

    def _take(self, message: echovlm_pb2.GenerateEvent) -> Event | None:
        """The event of a message; None for what the caller does not get."""
        event = event_from_proto(message)
        if isinstance(event, Accepted):
            if self.accepted is not None:
                # It was accepted before, by a server that was lost.
                return None
            self.accepted = event
        else:
            self._begun = True
        if isinstance(event, Summary):
            self.summary = event
        return event

    def _check_ended(self) -> None:
        """Raises `InternalServerError` where the stream ended without a summary."""
        if self.summary is None:
            raise InternalServerError(
                "the server ended the stream without a summary", request_id=self.request_id
            ) from None


class CallSettings:
    """How a client calls; the arguments are those of `EchoVLMClient`."""

    def __init__(
        self,
        address: str,
        token: str | None,
        tls: TLS | None,
        timeout_s: float | None,
        retry: bool,
        waiting: Waiting | None,
    ) -> None:
        check_connection(address, token, tls)
        self._timeout_s = timeout("timeout_s", timeout_s)
        self._retry = retry
        self._waiting = waiting
        self._address = address
        self._token = token

    def _retries_of(self, timeout_s: float | None) -> Retries:
        seconds = self._timeout_s if timeout_s is None else timeout("timeout_s", timeout_s)
        return Retries(seconds, retry=self._retry, waiting=self._waiting)
