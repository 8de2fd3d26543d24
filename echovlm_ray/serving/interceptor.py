"""What happens around every call of every server: its id, its credentials, its errors, and whether it is let in.

A servicer raises and is done; here the exception becomes a status (`serving.errors`). An exception that nobody expected
is logged with its place in the code but without its text, which may hold a patient's data.
"""

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager, nullcontext
from typing import Any

import grpc
from google.rpc import code_pb2
from grpc_status import rpc_status

from echovlm_ray.errors import ShuttingDownError
from echovlm_ray.serving.auth import BearerTokens
from echovlm_ray.serving.errors import to_status
from echovlm_ray.serving.request_id import REQUEST_ID_KEY, request_id_of, set_request_id

logger = logging.getLogger(__name__)

# Probes carry no token, and must be answered to the last.
HEALTH = "/grpc.health.v1.Health/"
# Calls that never end by themselves; a server that stops does not wait for them.
ENDLESS = frozenset(
    {
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/echovlm.v1.ExpertControl/Watch",
        "/echovlm.v1.RolloutFeed/WatchPolicy",
        "/echovlm.v1.ExpertGroup/Forward",
    }
)

Behaviour = Callable[[Any, grpc.aio.ServicerContext], Any]


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every handler of a server, and knows how many calls are under way."""

    def __init__(self, tokens: BearerTokens | None = None) -> None:
        """With `tokens`, all calls but health checks must carry one."""
        self._tokens = tokens
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    @property
    def active_calls(self) -> int:
        """Calls under way that will end by themselves."""
        return self._active

    def refuse_new_calls(self) -> None:
        """From now on every new call but a health check ends `UNAVAILABLE`, to be sent to another replica."""
        self._draining = True

    async def wait_until_idle(self) -> None:
        """Returns when no call is under way that ends by itself."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Puts the wrapper around the handler that the server would call; part of grpc's interface."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if handler.request_streaming and handler.response_streaming:
            behaviour, make = handler.stream_stream, grpc.stream_stream_rpc_method_handler
        elif handler.request_streaming:
            behaviour, make = handler.stream_unary, grpc.stream_unary_rpc_method_handler
        elif handler.response_streaming:
            behaviour, make = handler.unary_stream, grpc.unary_stream_rpc_method_handler
        else:
            behaviour, make = handler.unary_unary, grpc.unary_unary_rpc_method_handler
        wrap = self._streaming if handler.response_streaming else self._single
        return make(wrap(method, behaviour), handler.request_deserializer, handler.response_serializer)

    def _single(self, method: str, behaviour: Behaviour) -> Behaviour:
        async def handle(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._call(method, context):
                return await behaviour(request, context)

        return handle

    def _streaming(self, method: str, behaviour: Behaviour) -> Behaviour:
        async def handle(request: Any, context: grpc.aio.ServicerContext) -> None:
            async with self._call(method, context):
                responses = behaviour(request, context)
                if not hasattr(responses, "__aiter__"):
                    await responses
                    return
                async with aclosing(responses):
                    async for response in responses:
                        await context.write(response)

        return handle

    @asynccontextmanager
    async def _call(self, method: str, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        metadata = list(context.invocation_metadata() or ())
        request_id = request_id_of(metadata)
        echo = ((REQUEST_ID_KEY, request_id),)
        set_request_id(request_id)
        context.set_trailing_metadata(echo)
        try:
            admitted = self._admit(method, metadata)
            await context.send_initial_metadata(echo)
            async with admitted:
                with self._counted(method):
                    yield
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            status = to_status(error)
            if status.code == code_pb2.INTERNAL:
                logger.error("%s failed, request id %s\n%s", method, request_id, trace_without_text(error))
            converted = rpc_status.to_status(status)
            await context.abort(converted.code, converted.details, (*converted.trailing_metadata, *echo))

    def _admit(self, method: str, metadata: list[tuple[str, str | bytes]]) -> AbstractAsyncContextManager[None]:
        """Lets the call pass, or raises; it must stay inside what is returned, which ends it with its token."""
        if method.startswith(HEALTH):
            return nullcontext()
        digest = None if self._tokens is None else self._tokens.check(metadata)
        if self._draining:
            raise ShuttingDownError("this replica is shutting down; send the request again, another one will answer")
        return nullcontext() if self._tokens is None or digest is None else self._tokens.while_valid(digest)

    @contextmanager
    def _counted(self, method: str) -> Iterator[None]:
        if method in ENDLESS:
            yield
            return
        self._active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()


def trace_without_text(error: BaseException) -> str:
    """Where an exception and its causes came from, by file, line and type, without what they say."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        lines += [
            f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(cause.__traceback__)
        ]
        lines.append(f"{type(cause).__module__}.{type(cause).__qualname__}")
        cause = cause.__cause__
    return "\n".join(lines)
