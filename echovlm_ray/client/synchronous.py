"""The client for ordinary Python."""

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

    Leaving the `with` block, `cancel()`, or dropping the stream before its end cancels the request on the server.
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
        """The next event, waiting for it.

        Raises:
            EchoVLMError: the call failed; the type says how.
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
        """The text alone, piece by piece; afterwards `summary` is set."""
        for event in self:
            if isinstance(event, Text):
                yield event.text

    def cancel(self) -> None:
        """Ends the request here and on the server; after its end that does nothing."""
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
        """The stream itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancels what is not finished."""
        self.cancel()


class EchoVLMClient(CallSettings):
    """Calls an EchoVLM gateway. Safe to share between threads; make one and keep it.

    Args:
        address: host:port of the gateway.
        token: for servers with a token file; sent with every call, and never unencrypted to another machine.
        tls: for servers with certificates; `TLS()` trusts what the machine trusts.
        timeout_s: how long a call may take in seconds, unless it says otherwise; None: as long as the server allows.
        retry: whether a call is sent again that finds no server, or loses it before the first words of the answer; for
            as long as the call may take.
        waiting: called with the reason each time before a call waits to be sent again.

    Raises:
        ValueError: an address, token or certificate that cannot be used.

    Sending a call again is always safe, since no method has a lasting effect; it is not done once the text of the
    answer has begun, so that nothing is said twice. What is lost behind the gateway, the system itself tries again.
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
        """The whole answer at once.

        Args:
            images: DICOM files, stills (PNG, JPEG, TIFF …) or videos, each a path, its bytes, or a file opened with
                mode "rb"; one needs no list.
            timeout_s: for this call, in seconds; None takes the client's, `math.inf` as long as the server allows.
            request_id: what the server should log it under, at most 128 of A-Z a-z 0-9 . _ : / -; made up if None.
            options: task, language, prompt, sampling and so on: see `GenerateOptions`.

        Raises:
            EchoVLMError: the call failed; the type says how.
            TypeError: an option that does not exist.
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
        """The answer while it is written: `Accepted`, then `Text` again and again, at last `Summary`.

        Takes what `generate` takes. Returns at once; a failed call raises at the first event.

        Raises:
            InvalidRequestError: the request cannot be sent as it is.
            TypeError: an option that does not exist.
        """
        request = build_request(images, **options)
        request_id, metadata = call_metadata(self._token, request_id)
        retries = self._retries_of(timeout_s)

        def send() -> "grpc.CallIterator[echovlm_pb2.GenerateEvent]":
            return self._stub.GenerateStream(request, timeout=retries.remaining_s(), metadata=metadata)

        return AnswerStream(send, retries, self._closed, self._address, request_id)

    def model_info(self, *, timeout_s: float | None = None, request_id: str | None = None) -> ModelInfo:
        """What is served: model, organs with the versions of their experts, limits.

        Raises:
            EchoVLMError: the call failed; the type says how.
        """
        request_id, metadata = call_metadata(self._token, request_id)
        request = echovlm_pb2.GetModelInfoRequest()
        message = self._call(self._stub.GetModelInfo, request, timeout_s, request_id, metadata)
        return ModelInfo.from_proto(message)

    def close(self) -> None:
        """Closes the connection; calls under way are cancelled."""
        self._closed.set()
        self._channel.close()

    def __enter__(self) -> Self:
        """The client itself."""
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
    """Waits before the next try, or raises the failure where there is to be none."""
    if stopped.is_set() or stopped.wait(retries.pause_after(failure)):
        raise failure
