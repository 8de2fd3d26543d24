"""The client for asyncio: the same calls as `EchoVLMClient`, awaited."""

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

from echovlm_ray.client.arguments import timeout
from echovlm_ray.client.connection import DEFAULT_ADDRESS, TLS, call_metadata, channel_options, check_connection
from echovlm_ray.client.errors import InternalServerError, from_rpc_error
from echovlm_ray.client.request import GenerateOptions, Image, build_request
from echovlm_ray.client.types import Accepted, Answer, Event, ModelInfo, Summary, Text, event_from_proto
from protos import echovlm_pb2, echovlm_pb2_grpc


class AsyncAnswerStream(AsyncIterator[Event]):
    """An answer while it is written: iterate over its events, or over `text()` alone.

    Leaving the `async with` block, `cancel()`, cancelling the task that reads, or letting go of the stream before its
    end cancels the request on the server.
    """

    def __init__(
        self,
        call: "grpc.aio.UnaryStreamCall[echovlm_pb2.GenerateRequest, echovlm_pb2.GenerateEvent]",
        address: str,
        request_id: str,
    ) -> None:
        self._call = call
        self._address = address
        self.request_id = request_id
        self.accepted: Accepted | None = None
        self.summary: Summary | None = None

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            EchoVLMError: the call failed; the type says how.
            StopAsyncIteration: after the summary.
        """
        while True:
            try:
                message = await self._call.read()
            except grpc.RpcError as error:
                raise from_rpc_error(error, self._address, self.request_id) from None
            if message is grpc.aio.EOF:
                if self.summary is None:
                    raise InternalServerError(
                        "the server ended the stream without a summary", request_id=self.request_id
                    )
                raise StopAsyncIteration
            event = event_from_proto(message)
            if isinstance(event, Accepted):
                self.accepted = event
            elif isinstance(event, Summary):
                self.summary = event
            if event is not None:
                return event

    async def text(self) -> AsyncIterator[str]:
        """The text alone, piece by piece; afterwards `summary` is set."""
        async for event in self:
            if isinstance(event, Text):
                yield event.text

    def cancel(self) -> None:
        """Ends the request here and on the server; after its end that does nothing."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        """The stream itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancels what is not finished."""
        self.cancel()


class AsyncEchoVLMClient:
    """Calls an EchoVLM gateway from asyncio. Make one in a running event loop and keep it.

    Takes what `EchoVLMClient` takes, and sends lost calls again in the same way.

    Raises:
        ValueError: an address, token or certificate that cannot be used.
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
            self._channel = grpc.aio.insecure_channel(address, options)
        else:
            self._channel = grpc.aio.secure_channel(address, tls.credentials(), options)
        self._stub = echovlm_pb2_grpc.EchoVLMStub(self._channel)
        self._address = address
        self._token = token

    async def generate(
        self,
        images: Image | Sequence[Image] = (),
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Answer:
        """The whole answer at once; arguments and errors are those of `EchoVLMClient.generate`.

        Files named by a path are read before anything is awaited; pass bytes where that would hold up other tasks.
        """
        request = build_request(images, **options)
        request_id, metadata = call_metadata(self._token, request_id)
        try:
            response = await self._stub.Generate(request, timeout=self._timeout(timeout_s), metadata=metadata)
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
    ) -> AsyncAnswerStream:
        """The answer while it is written; arguments, events and errors are those of `EchoVLMClient.stream`."""
        request = build_request(images, **options)
        request_id, metadata = call_metadata(self._token, request_id)
        call = self._stub.GenerateStream(request, timeout=self._timeout(timeout_s), metadata=metadata)
        return AsyncAnswerStream(call, self._address, request_id)

    async def model_info(self, *, timeout_s: float | None = None, request_id: str | None = None) -> ModelInfo:
        """What is served: model, organs with the versions of their experts, limits.

        Raises:
            EchoVLMError: the call failed; the type says how.
        """
        request_id, metadata = call_metadata(self._token, request_id)
        request = echovlm_pb2.GetModelInfoRequest()
        try:
            message = await self._stub.GetModelInfo(request, timeout=self._timeout(timeout_s), metadata=metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._address, request_id) from None
        return ModelInfo.from_proto(message)

    async def close(self) -> None:
        """Closes the connection; calls under way are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connection."""
        await self.close()

    def _timeout(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout("timeout_s", timeout_s)
