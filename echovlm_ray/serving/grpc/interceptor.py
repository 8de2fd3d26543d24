"""Wraps every call of every server: request id, credentials, errors, admission.

All handlers are registered in gRPC with a stream of bytes as input, so that no message is received before the call's
credentials were checked and it was admitted. `serving.incoming` reads, decompresses and parses the messages.

Exceptions of a servicer become a status here (`serving.grpc.errors`). An unexpected exception is logged with its stack
but without its text, which may contain a patient's data.
"""

import asyncio
import hashlib
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    aclosing,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from math import inf
from types import TracebackType
from typing import Any, cast

import grpc
from google.rpc import code_pb2
from grpc_status import rpc_status

from echovlm_ray.errors import DeadlineError, ShuttingDownError, UnauthenticatedError
from echovlm_ray.serving.core.caller import KnownToken, caller_of, current_caller, set_caller
from echovlm_ray.serving.grpc.auth import BearerTokens
from echovlm_ray.serving.grpc.errors import to_status
from echovlm_ray.serving.grpc.incoming import Incoming
from echovlm_ray.serving.grpc.open_calls import OpenCalls
from echovlm_ray.serving.grpc.received_bytes import new_receipt
from echovlm_ray.serving.grpc.refusals import Refusals
from echovlm_ray.serving.grpc.request_id import REQUEST_ID_KEY, current_request_id, request_id_of, set_request_id
from echovlm_ray.serving.grpc.sender import sender_of

logger = logging.getLogger(__name__)

# Probes carry no token, and must be answered to the last.
HEALTH = "/grpc.health.v1.Health/"
# Calls that never end by themselves; a server that stops does not wait for them.
ENDLESS = frozenset(
    {
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/echovlm.v1.ExpertControl/Watch",
        "/echovlm.v1.ExpertControl/Replay",
        "/echovlm.v1.RolloutFeed/WatchPolicy",
        "/echovlm.v1.ExpertGroup/Forward",
    }
)

# The default for one message.
MAX_PARSED_BYTES = 256 * 1024 * 1024
# A caller that takes in nothing of an answer for so long is not waited for.
STALLED_WRITE_S = 20.0
# A servicer that checks the deadline itself gives a more specific error.
DEADLINE_SLACK_S = 0.25
LATE = "the deadline passed before the answer was complete"

Behaviour = Callable[[Any, grpc.aio.ServicerContext], Any]
# The place that a call of a method takes, by the method's full name; entering it raises where there is none.
Admit = Callable[[str], AbstractContextManager[None]]


class _Call:
    """One running call, which must end within a limit, including the writing of its answer."""

    def __init__(self, seconds: float | None, held: ExitStack) -> None:
        """Takes how long it may last, None forever, and what to release when it has ended."""
        self._loop = asyncio.get_running_loop()
        self._ends_at = None if seconds is None else self._loop.time() + seconds
        self._held = held
        self._limit = asyncio.timeout(None)
        self._writes_since: float | None = None
        # Why it must end before it has.
        self._ending: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> "_Call":
        await self._limit.__aenter__()
        if self._ends_at is not None:
            self._look()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError:
            raise self._ending or DeadlineError(LATE) from None

    def end(self, error: Exception) -> None:
        """Ends the call with an error: immediately, or after the message that is being written."""
        if self._ending is not None:
            return
        self._ending = error
        if self._writes_since is None:
            self._limit.reschedule(self._loop.time())
        else:
            self._held.close()

    async def write(self, context: grpc.aio.ServicerContext, response: Any) -> None:
        """Writes a message.

        gRPC cannot cancel a write, and sends nothing else until it is done. A call that must end during a write
        therefore first releases its resources, and then waits for the caller to read.

        Raises:
            Exception: what it must end with, such as a `DeadlineError`.
        """
        self._writes_since = self._loop.time()
        await context.write(response)
        self._writes_since = None
        if self._ending is not None:
            raise self._ending

    def _look(self) -> None:
        now = self._loop.time()
        assert self._ends_at is not None
        stalled_at = inf if self._writes_since is None else self._writes_since + STALLED_WRITE_S
        if now < min(self._ends_at, stalled_at):
            self._timer = self._loop.call_at(min(self._ends_at, stalled_at, now + STALLED_WRITE_S / 2), self._look)
        else:
            self.end(DeadlineError(LATE))


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every handler of a server, and counts running calls."""

    def __init__(
        self,
        tokens: BearerTokens | None = None,
        incoming: Incoming | None = None,
        *,
        call_limit_s: float | None = None,
        certificates: bool = False,
        open_calls: OpenCalls | None = None,
        refusals: Refusals | None = None,
    ) -> None:
        """
        Args:
            tokens: when given, all calls but health checks must carry one.
            incoming: takes in the messages.
            call_limit_s: for a call without a deadline that is not a watch; None for no limit.
            certificates: whether clients show who they are by one.
            open_calls: bounds those of one sender; None for callers that are parts of the system.
            refusals: counts the calls that are refused.
        """
        self._tokens = tokens
        self._incoming = incoming if incoming is not None else Incoming(MAX_PARSED_BYTES)
        self._call_limit_s = call_limit_s
        self._certificates = certificates
        self._open_calls = open_calls
        self._refusals = refusals if refusals is not None else Refusals()
        self._places: dict[str, Admit] = {}
        self._wrapped: dict[str, grpc.RpcMethodHandler] = {}
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    def limit(self, service_name: str, admit: Admit) -> None:
        """Has every call of a service take its place before its message is read, and leave it when it has ended."""
        self._places[service_name] = admit

    @property
    def active_calls(self) -> int:
        """Running calls, without watches, which never end."""
        return self._active

    def refuse_new_calls(self) -> None:
        """From now on every new call but a health check ends `UNAVAILABLE`, to be sent to another replica."""
        self._draining = True

    async def wait_until_idle(self) -> None:
        """Returns when no call is running except for watches."""
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
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            wrapped = self._wrapped[method] = self._wrap(method, handler)
        return wrapped

    def _wrap(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        behaviour = handler.stream_stream or handler.stream_unary or handler.unary_stream or handler.unary_unary
        taken = self._taking(behaviour, handler, is_check=method.startswith(HEALTH))
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._streaming(method, taken), None, handler.response_serializer
            )
        return grpc.stream_unary_rpc_method_handler(self._single(method, taken), None, handler.response_serializer)

    def _taking(
        self, behaviour: Behaviour, handler: grpc.RpcMethodHandler, *, is_check: bool
    ) -> Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]:
        """What begins the behaviour once its message has come."""
        parse, incoming = handler.request_deserializer, self._incoming

        async def one(requests: Any, context: grpc.aio.ServicerContext) -> Any:
            # Sent while the message is read: one after the other takes a fifth of a short call longer.
            sending = asyncio.get_running_loop().create_task(_send_initial_metadata(context))
            try:
                message = [await incoming.one(context, parse, is_check=is_check)]
            finally:
                await sending
            # Not in a variable, so that a handler that has processed its message frees its memory.
            return behaviour(message.pop(), context)

        async def several(requests: Any, context: grpc.aio.ServicerContext) -> Any:
            await _send_initial_metadata(context)
            return behaviour(requests if parse is None else incoming.each(context, parse), context)

        return several if handler.request_streaming else one

    def _single(self, method: str, begin: Callable[..., Awaitable[Any]]) -> Behaviour:
        async def handle(requests: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._call(method, context):
                return await (await begin(requests, context))

        return handle

    def _streaming(self, method: str, begin: Callable[..., Awaitable[Any]]) -> Behaviour:
        async def handle(requests: Any, context: grpc.aio.ServicerContext) -> None:
            async with self._call(method, context) as call:
                responses = await begin(requests, context)
                if not hasattr(responses, "__aiter__"):
                    await responses
                    return
                async with aclosing(responses):
                    async for response in responses:
                        await call.write(context, response)

        return handle

    @asynccontextmanager
    async def _call(self, method: str, context: grpc.aio.ServicerContext) -> AsyncIterator[_Call]:
        metadata = list(context.invocation_metadata() or ())
        request_id = request_id_of(metadata)
        echo = ((REQUEST_ID_KEY, request_id),)
        set_request_id(request_id)
        context.set_trailing_metadata(echo)
        try:
            with ExitStack() as held:
                token = await self._admit(method, metadata)
                set_caller(caller_of(token, _identities(context) if self._certificates else None))
                if self._open_calls is not None:
                    self._open_calls.enter(sender_of(context), context)
                held.enter_context(self._place(method))
                held.callback(new_receipt().release)
                held.enter_context(self._counted(method))
                async with _Call(self._seconds(method, context), held) as call:
                    if self._tokens is not None and token is not None:
                        held.enter_context(self._tokens.watched(token.digest, call.end))
                    yield call
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            self._refusals.add(error, current_caller().names)
            status = to_status(error)
            # Where gRPC itself could not send, the caller is gone. That is no failure, see `_send_initial_metadata`.
            if status.code == code_pb2.INTERNAL and not isinstance(error, grpc.aio.InternalError):
                logger.error("%s failed, request id %s\n%s", method, request_id, trace_without_text(error))
            converted = rpc_status.to_status(status)
            await context.abort(converted.code, converted.details, (*converted.trailing_metadata, *echo))

    def _seconds(self, method: str, context: grpc.aio.ServicerContext) -> float | None:
        if self._call_limit_s is None or method in ENDLESS:
            return None
        remaining: float | None = context.time_remaining()
        return (self._call_limit_s if remaining is None else max(0.0, remaining)) + DEADLINE_SLACK_S

    def _place(self, method: str) -> AbstractContextManager[None]:
        admit = self._places.get(method.rpartition("/")[0].lstrip("/"))
        return nullcontext() if admit is None else admit(method)

    async def _admit(self, method: str, metadata: list[tuple[str, str | bytes]]) -> KnownToken | None:
        """Lets the call pass, or raises. Returns the token that it must end with, if there is one."""
        if method.startswith(HEALTH):
            # A probe may carry a token, to be distinguished from what else comes from its address.
            with suppress(UnauthenticatedError):
                return None if self._tokens is None else self._tokens.check(metadata)
            return None
        token = None if self._tokens is None else await self._tokens.admit(metadata)
        if self._draining:
            raise ShuttingDownError("this replica is shutting down; send the request again, another one will answer")
        return token

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


def _identities(context: grpc.aio.ServicerContext) -> Iterable[bytes]:
    """The names in the client's certificate; of one without names, its digest."""
    if names := context.peer_identities():
        return cast(Iterable[bytes], names)
    return [hashlib.sha256(pem).hexdigest().encode() for pem in context.auth_context().get("x509_pem_cert", ())]


async def _send_initial_metadata(context: grpc.aio.ServicerContext) -> None:
    # A disconnected caller is not a failure, and a log line for each would fill the disk.
    with suppress(grpc.aio.InternalError):
        await context.send_initial_metadata(((REQUEST_ID_KEY, current_request_id()),))


def trace_without_text(error: BaseException) -> str:
    """The trace of an exception and its causes by file, line and type, without their texts."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        lines += [
            f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(cause.__traceback__)
        ]
        lines.append(f"{type(cause).__module__}.{type(cause).__qualname__}")
        cause = cause.__cause__
    return "\n".join(lines)
