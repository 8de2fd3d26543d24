"""The client for ordinary Python."""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

from echovlm_ray.client.arguments import timeout
from echovlm_ray.client.connection import DEFAULT_ADDRESS, TLS, call_metadata, channel_options, check_connection
from echovlm_ray.client.errors import InternalServerError, from_rpc_error
from echovlm_ray.client.request import GenerateOptions, Image, build_request
from echovlm_ray.client.types import Accepted, Answer, Event, ModelInfo, Summary, Text, event_from_proto
from protos import echovlm_pb2, echovlm_pb2_grpc


class AnswerStream(Iterator[Event]):
    """An answer while it is written: iterate over its events, or over `text()` alone.

    Leaving the `with` block, `cancel()`, or letting go of the stream before its end cancels the request on the server.
    """

    def __init__(self, call: "grpc.CallIterator[echovlm_pb2.GenerateEvent]", address: str, request_id: str) -> None:
        self._call = call
        self._address = address
        self.request_id = request_id
        self.accepted: Accepted | None = None
        self.summary: Summary | None = None

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
                if self.summary is None:
                    raise InternalServerError(
                        "the server ended the stream without a summary", request_id=self.request_id
                    ) from None
                raise
            except grpc.RpcError as error:
                raise from_rpc_error(error, self._address, self.request_id) from None
            event = event_from_proto(message)
            if isinstance(event, Accepted):
                self.accepted = event
            elif isinstance(event, Summary):
                self.summary = event
            if event is not None:
                return event

    def text(self) -> Iterator[str]:
        """The text alone, piece by piece; afterwards `summary` is set."""
        for event in self:
            if isinstance(event, Text):
                yield event.text

    def cancel(self) -> None:
        """Ends the request here and on the server; after its end that does nothing."""
        self._call.cancel()

    def __enter__(self) -> Self:
        """The stream itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancels what is not finished."""
        self.cancel()


class EchoVLMClient:
    """Calls an EchoVLM gateway. Safe to share between threads; make one and keep it.

    Args:
        address: host:port of the gateway.
        token: for servers with a token file; sent with every call, and never unencrypted to another machine.
        tls: for servers with certificates; `TLS()` trusts what the machine trusts.
        timeout_s: how long a call may take in seconds, unless it says otherwise; None: as long as the server allows.
        retry: whether a call is sent again that finds no server, or one that is stopping; for about seven seconds.

    Raises:
        ValueError: an address, token or certificate that cannot be used.

    Sending a call again is always safe, since no method has a lasting effect; it is not done once the answer has begun.
    What is lost behind the gateway, the system itself tries again.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        tls: TLS | None = None,
        timeout_s: float | None = 300.0,
        retry: bool = True,
    ) -> None:
        check_connection(address, token, tls)
        self._timeout_s = timeout("timeout_s", timeout_s)
        options = channel_options(address, tls, retry=retry)
        if tls is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, tls.credentials(), options)
        self._stub = echovlm_pb2_grpc.EchoVLMStub(self._channel)
        self._address = address
        self._token = token

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
            request_id: what the server shall log it under, at most 128 of A-Z a-z 0-9 . _ : / -; made up if None.
            options: task, language, prompt, sampling and so on: see `GenerateOptions`.

        Raises:
            EchoVLMError: the call failed; the type says how.
            TypeError: an option that does not exist.
        """
        request = build_request(images, **options)
        request_id, metadata = call_metadata(self._token, request_id)
        try:
            response = self._stub.Generate(request, timeout=self._timeout(timeout_s), metadata=metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._address, request_id) from None
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
        call = self._stub.GenerateStream(request, timeout=self._timeout(timeout_s), metadata=metadata)
        return AnswerStream(call, self._address, request_id)

    def model_info(self, *, timeout_s: float | None = None, request_id: str | None = None) -> ModelInfo:
        """What is served: model, organs with the versions of their experts, limits.

        Raises:
            EchoVLMError: the call failed; the type says how.
        """
        request_id, metadata = call_metadata(self._token, request_id)
        request = echovlm_pb2.GetModelInfoRequest()
        try:
            message = self._stub.GetModelInfo(request, timeout=self._timeout(timeout_s), metadata=metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._address, request_id) from None
        return ModelInfo.from_proto(message)

    def close(self) -> None:
        """Closes the connection; calls under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connection."""
        self.close()

    def _timeout(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout("timeout_s", timeout_s)
