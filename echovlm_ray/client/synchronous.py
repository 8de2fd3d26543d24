"""The synchronous client."""

import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc

from echovlm_ray.client.common import AnswerState, CallSettings
from echovlm_ray.client.connection import DEFAULT_ADDRESS, TLS, call_metadata, open_channel
from echovlm_ray.client.errors import EchoVLMError, from_rpc_error
from echovlm_ray.client.request import GenerateOptions, Image, build_request
from echovlm_ray.client.retries import Retries, Waiting
from echovlm_ray.client.types import Answer, Event, ModelInfo, Summary
from echovlm_ray.events import Text
from protos import echovlm_pb2, echovlm_pb2_grpc

Response = TypeVar("Response")
Metadata = tuple[tuple[str, str], ...]


class AnswerStream(AnswerState, Iterator[Event]):
    """An answer while it is written: iterate over its events, or over `text()` alone.

    Leaving the `with` block, `cancel()`, or deleting the stream before its end cancels the request on the server.
    """

    def __init__(
        self,
        send: "Callable[[], grpc.CallIterator[echovlm_pb2.GenerateEvent]]",
        retries: Retries,
        closed: threading.Event,
        address: str,
        request_id: str,
    ) -> None:
        super().__init__(address, request_id)
        self._send = send
        self._retries = retries
        self._closed = closed
        self._call = send()
        self._cancelled = threading.Event()

    def __next__(self) -> Event:
        """Waits for the next event.

        Raises:
            EchoVLMError: the call failed; see its subclasses.
            StopIteration: after the summary.
        """
        while True:
            try:
                message = next(self._call)
            except StopIteration:
                self._check_ended()
                raise
            except grpc.RpcError as error:
                self._send_again(from_rpc_error(error, self._address, self.request_id))
                continue
            if (event := self._take(message)) is not None:
                return event

    def text(self) -> Iterator[str]:
        """Iterates over the pieces of the text; afterwards `summary` is set."""
        for event in self:
            if isinstance(event, Text):
                yield event.text

    def cancel(self) -> None:
        """Cancels the request here and on the server. Does nothing after its end."""
        self._cancelled.set()
        self._call.cancel()

    def _send_again(self, failure: EchoVLMError) -> None:
        if self._begun or self._closed.is_set():
            raise failure
        _pause(self._retries, failure, self._cancelled)
        self._call = self._send()
        if self._cancelled.is_set():
            self._call.cancel()

    def __enter__(self) -> Self:
        """Returns the stream."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancels an unfinished request."""
        self.cancel()


class EchoVLMClient(CallSettings):
    """Calls an EchoVLM gateway. Safe to share between threads; make one and keep it.

    Args:
        address: host:port of the gateway.
        token: the bearer token, for servers with a token file; never sent unencrypted to another machine.
        tls: for servers with certificates; `TLS()` trusts the machine's authorities.
        timeout_s: the default timeout of a call in seconds; None for the server's limit.
        retry: whether to retry calls that do not reach a server, or lose it before the first text of the answer, until
            the call's timeout.
        waiting: called with the reason before each retry.

    Raises:
        ValueError: an address, token or certificate is invalid.

    A retry is always safe, because no method has lasting effects. There is no retry once the text of the answer has
    begun, so that no text is repeated. The system retries failures behind the gateway.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        tls: TLS | None = None,
        timeout_s: float | None = 300.0,
        retry: bool = True,
        waiting: Waiting | None = None,
    ) -> None:
        super().__init__(address, token, tls, timeout_s, retry, waiting)
        # Ends the pauses between tries.
        self._closed = threading.Event()
        self._channel = open_channel(address, tls)
        self._stub = echovlm_pb2_grpc.EchoVLMStub(self._channel)

    def generate(
        self,
        images: Image | Sequence[Image] = (),
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Answer:
        """Returns the complete answer.

        Args:
            images: DICOM files, stills (PNG, JPEG, TIFF …) or videos, each as a path, bytes, or a file opened with mode
                "rb". A single one needs no list.
            timeout_s: the timeout in seconds; None for the client's, `math.inf` for the server's limit.
            request_id: the id in the server's log, at most 128 of A-Z a-z 0-9 . _ : / -; generated if None.
            options: task, language, prompt, sampling and so on: see `GenerateOptions`.

        Raises:
            EchoVLMError: the call failed; see its subclasses.
            TypeError: an option does not exist.
        """
        request = build_request(images, **options)
        request_id, metadata = call_metadata(self._token, request_id)
        response = self._call(self._stub.Generate, request, timeout_s, request_id, metadata)
        return Answer(response.text, Summary.from_proto(response.summary))

    def stream(
        self,
        images: Image | Sequence[Image] = (),
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AnswerStream:
        """Streams the answer: one `Accepted`, then any number of `Text`, then one `Summary`.

        Arguments are those of `generate`. Returns immediately; a failed call raises at the first event.

        Raises:
            InvalidRequestError: the request is invalid.
            TypeError: an option does not exist.
        """
        request = build_request(images, **options)
        request_id, metadata = call_metadata(self._token, request_id)
        retries = self._retries_of(timeout_s)

        def send() -> "grpc.CallIterator[echovlm_pb2.GenerateEvent]":
            return self._stub.GenerateStream(request, timeout=retries.remaining_s(), metadata=metadata)

        return AnswerStream(send, retries, self._closed, self._address, request_id)

    def model_info(self, *, timeout_s: float | None = None, request_id: str | None = None) -> ModelInfo:
        """Describes the server: the model, the organs with the versions of their experts, and the limits.

        Raises:
            EchoVLMError: the call failed; see its subclasses.
        """
        request_id, metadata = call_metadata(self._token, request_id)
        request = echovlm_pb2.GetModelInfoRequest()
        message = self._call(self._stub.GetModelInfo, request, timeout_s, request_id, metadata)
        return ModelInfo.from_proto(message)

    def close(self) -> None:
        """Closes the connection and cancels running calls."""
        self._closed.set()
        self._channel.close()

    def __enter__(self) -> Self:
        """Returns the client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connection."""
        self.close()

    def _call(
        self,
        method: "Callable[..., Response]",
        request: object,
        timeout_s: float | None,
        request_id: str,
        metadata: Metadata,
    ) -> "Response":
        retries = self._retries_of(timeout_s)
        while True:
            try:
                return method(request, timeout=retries.remaining_s(), metadata=metadata)
            except grpc.RpcError as error:
                failure = from_rpc_error(error, self._address, request_id)
            _pause(retries, failure, self._closed)


def _pause(retries: Retries, failure: EchoVLMError, stopped: threading.Event) -> None:
    """Waits before the next attempt, or raises the error if there is none."""
    if stopped.is_set() or stopped.wait(retries.pause_after(failure)):
        raise failure
