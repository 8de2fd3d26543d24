"""The client for asyncio: the same calls as `EchoVLMClient`, awaited."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

from echovlm_ray.client.common import AnswerState, CallSettings
from echovlm_ray.client.connection import (
    DEFAULT_ADDRESS,
    TLS,
    call_metadata,
    open_asynchronous_channel,
)
from echovlm_ray.client.errors import EchoVLMError, from_rpc_error
from echovlm_ray.client.request import GenerateOptions, Image, build_request
from echovlm_ray.client.retries import Retries, Waiting
from echovlm_ray.client.synchronous import Metadata, Response
from echovlm_ray.client.types import Answer, Event, ModelInfo, Summary
from echovlm_ray.events import Text
from protos import echovlm_pb2, echovlm_pb2_grpc


class AsyncAnswerStream(AnswerState, AsyncIterator[Event]):
    """An answer while it is written: iterate over its events, or over `text()` alone.

    Leaving the `async with` block, `cancel()`, cancelling the reading task, or deleting the stream before its end
    cancels the request on the server.
    """

    def __init__(
        self,
        send: "Callable[[], grpc.aio.UnaryStreamCall[echovlm_pb2.GenerateRequest, echovlm_pb2.GenerateEvent]]",
        retries: Retries,
        closed: Callable[[], bool],
        address: str,
        request_id: str,
    ) -> None:
        super().__init__(address, request_id)
        self._send = send
        self._retries = retries
        self._closed = closed
        self._call = send()
        self._cancelled = asyncio.Event()

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            EchoVLMError: the call failed; see its subclasses.
            StopAsyncIteration: after the summary.
        """
        while True:
            try:
                message = await self._call.read()
            except grpc.RpcError as error:
                await self._send_again(from_rpc_error(error, self._address, self.request_id))
                continue
            if message is grpc.aio.EOF:
                self._check_ended()
                raise StopAsyncIteration
            if (event := self._take(message)) is not None:
                return event

    async def text(self) -> AsyncIterator[str]:
        """Iterates over the pieces of the text; afterwards `summary` is set."""
        async for event in self:
            if isinstance(event, Text):
                yield event.text

    def cancel(self) -> None:
        """Cancels the request here and on the server. Does nothing after its end."""
        self._cancelled.set()
        self._call.cancel()

    async def _send_again(self, failure: EchoVLMError) -> None:
        if self._begun or self._cancelled.is_set() or self._closed():
            raise failure
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._retries.pause_after(failure)):
                await self._cancelled.wait()
        if self._cancelled.is_set():
            raise failure
        self._call = self._send()

    async def __aenter__(self) -> Self:
        """Returns the stream."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancels an unfinished request."""
        self.cancel()


class AsyncEchoVLMClient(CallSettings):
    """Calls an EchoVLM gateway from asyncio. Make one in a running event loop and keep it.

    Arguments and retries are those of `EchoVLMClient`.

    Raises:
        ValueError: an address, token or certificate is invalid.
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
        self._closed = False
        self._channel = open_asynchronous_channel(address, tls)
        self._stub = echovlm_pb2_grpc.EchoVLMStub(self._channel)

    async def generate(
        self,
        images: Image | Sequence[Image] = (),
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Answer:
        """Returns the complete answer. Arguments and errors are those of `EchoVLMClient.generate`.

        Files are read synchronously before the call; pass bytes if that would block other tasks.
        """
        request = build_request(images, **options)
        request_id, metadata = call_metadata(self._token, request_id)
        response = await self._call(self._stub.Generate, request, timeout_s, request_id, metadata)
        return Answer(response.text, Summary.from_proto(response.summary))

    def stream(
        self,
        images: Image | Sequence[Image] = (),
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncAnswerStream:
        """Streams the answer. Arguments, events and errors are those of `EchoVLMClient.stream`."""
        request = build_request(images, **options)
        request_id, metadata = call_metadata(self._token, request_id)
        retries = self._retries_of(timeout_s)

        def send() -> "grpc.aio.UnaryStreamCall[echovlm_pb2.GenerateRequest, echovlm_pb2.GenerateEvent]":
            return self._stub.GenerateStream(request, timeout=retries.remaining_s(), metadata=metadata)

        return AsyncAnswerStream(send, retries, lambda: self._closed, self._address, request_id)

    async def model_info(self, *, timeout_s: float | None = None, request_id: str | None = None) -> ModelInfo:
        """Describes the server: the model, the organs with the versions of their experts, and the limits.

        Raises:
            EchoVLMError: the call failed; see its subclasses.
        """
        request_id, metadata = call_metadata(self._token, request_id)
        request = echovlm_pb2.GetModelInfoRequest()
        message = await self._call(self._stub.GetModelInfo, request, timeout_s, request_id, metadata)
        return ModelInfo.from_proto(message)

    async def close(self) -> None:
        """Closes the connection and cancels running calls."""
        self._closed = True
        await self._channel.close()

    async def __aenter__(self) -> Self:
        """Returns the client."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connection."""
        await self.close()

    async def _call(
        self,
        method: "Callable[..., Awaitable[Response]]",
        request: object,
        timeout_s: float | None,
        request_id: str,
        metadata: Metadata,
    ) -> "Response":
        retries = self._retries_of(timeout_s)
        while True:
            try:
                return await method(request, timeout=retries.remaining_s(), metadata=metadata)
            except grpc.RpcError as error:
                failure = from_rpc_error(error, self._address, request_id)
            if self._closed:
                raise failure
            await asyncio.sleep(retries.pause_after(failure))
