"""The gRPC face of an expert group: the token loop, and loading and unloading."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.rpc import status_pb2
from grpc.aio import ServicerContext

from experts.errors import InvalidTensorError
from experts.group import ExpertGroup
from experts.loaded import Resident
from experts.transport import wire
from experts.transport.expert_calls import ExpertCalls
from experts.transport.local_server import LocalTransportServer
from experts.transport.secret import NO_SECRET, SystemSecret
from protos import expert_pb2

_Answer = Callable[[bytes], Awaitable[None]]
# A local caller's thread holds up nothing else while it computes: not the event loop, and with it health checks.
_LOCAL_INLINE_FACTOR = 8


class ExpertGroupService:
    """Serves one group on a grpc.aio server, and on a Unix socket for callers on the same host.

    Expert calls of all streams overlap and are answered as they finish. What goes wrong with one is its answer; the
    stream goes on. When a stream ends its calls are dropped: they are pure functions, and the caller sends them again
    elsewhere. Load, Unload and Status raise, and leave the status to the server.
    """

    def __init__(
        self,
        group: ExpertGroup,
        *,
        to_status: Callable[[Exception], status_pb2.Status],
        max_queue: int,
        workers: int = 2,
        inline_multiply_adds: int = 8_000_000,
        secret: SystemSecret = NO_SECRET,
    ) -> None:
        """Starts the threads that compute, and the server for callers on the same host.

        Args:
            group: what is served.
            to_status: turns an exception into the status that the caller sees.
            max_queue: when more calls than this are received and not yet answered, further ones are refused.
            workers: calls computed at the same time.
            inline_multiply_adds: a call of at most this many is computed on the event loop when nothing else
                waits. Passing it to a thread and back takes 110 to 160 µs (measured, grpcio 1.85, one thread), while
                a core does this many in less than 1 ms. On the Unix socket it may be eight times as large. 0 computes
                all in threads.
            secret: what callers on the Unix socket must send first.
        """
        self._group = group
        self._inline_multiply_adds = inline_multiply_adds
        self._calls = ExpertCalls(group, to_status=to_status, max_queue=max_queue)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=f"experts-{group.organ}")
        self._instance = secrets.token_hex(16)
        self._local_server = LocalTransportServer(
            self._calls,
            self._pool,
            instance=self._instance,
            inline_multiply_adds=_LOCAL_INLINE_FACTOR * inline_multiply_adds,
            secret=secret,
        )

    @property
    def exchanges_in_flight(self) -> int:
        """Calls received and not yet answered."""
        return self._calls.in_flight

    @property
    def exchanges_received(self) -> int:
        """All calls since the start, refused ones too."""
        return self._calls.received

    def resident_bundles(self) -> list[expert_pb2.ResidentBundle]:
        """What can be used now, as status shows it."""
        return [_resident_to_proto(resident) for resident in self._group.resident()]

    def close(self) -> None:
        """Ends the connections on the Unix socket and stops the threads; for after the gRPC server has stopped."""
        self._local_server.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def Forward(self, request_iterator: AsyncIterator[bytes], context: "ServicerContext[bytes, bytes]") -> None:
        """The token loop, in serialised messages; see the .proto."""
        writing = asyncio.Lock()

        async def answer(response: bytes) -> None:
            # gRPC allows one write at a time.
            async with writing:
                await context.write(response)

        unreadable = False
        async with asyncio.TaskGroup() as calls:
            async for message in request_iterator:
                try:
                    request, data = wire.parse(expert_pb2.ForwardRequest, message)
                except wire.DecodeError:
                    # Raised below: a task group would wrap it.
                    unreadable = True
                    break
                before = self._calls.begin()
                if before is None:
                    # Awaited here, so that a caller that reads no answers is not read either.
                    await answer(self._calls.refusal(request))
                    continue
                cost = self._calls.multiply_adds(request)
                if before == 0 and cost is not None and cost <= self._inline_multiply_adds:
                    try:
                        await answer(self._calls.compute(request, data))
                    finally:
                        self._calls.end()
                else:
                    call = calls.create_task(self._call(request, data, answer))
                    # Not in the task itself: one that is cancelled before it starts runs nothing.
                    call.add_done_callback(self._calls.end)
        if unreadable:
            raise InvalidTensorError("a message of the stream is no ForwardRequest")

    async def Load(
        self, request: expert_pb2.LoadRequest, context: "ServicerContext[Any, Any]"
    ) -> expert_pb2.LoadResponse:
        """Makes a bundle resident; raises what `ExpertGroup.load` raises."""
        resident = await asyncio.to_thread(self._group.load, request.bundle_digest)
        return expert_pb2.LoadResponse(bundle=_resident_to_proto(resident))

    async def Unload(
        self, request: expert_pb2.UnloadRequest, context: "ServicerContext[Any, Any]"
    ) -> expert_pb2.UnloadResponse:
        """Unloads a bundle once its calls have ended."""
        await asyncio.to_thread(self._group.unload, request.bundle_digest)
        return expert_pb2.UnloadResponse()

    async def Status(
        self, request: expert_pb2.ExpertGroupStatusRequest, context: "ServicerContext[Any, Any]"
    ) -> expert_pb2.ExpertGroupStatusResponse:
        """What is resident, and where callers on the same host may share memory."""
        return expert_pb2.ExpertGroupStatusResponse(
            organ=self._group.organ,
            bundles=self.resident_bundles(),
            exchanges_in_flight=self.exchanges_in_flight,
            local_socket=self._local_server.socket_path,
            instance=self._instance,
            limit_bytes=self._group.max_resident_bytes,
            loading=[
                expert_pb2.LoadingBundle(digest=digest, progress=progress)
                for digest, progress in self._group.loading().items()
            ],
        )

    async def _call(self, request: expert_pb2.ForwardRequest, data: memoryview | None, answer: _Answer) -> None:
        loop = asyncio.get_running_loop()
        await answer(await loop.run_in_executor(self._pool, self._calls.compute, request, data))


def add_expert_group_to_server(service: ExpertGroupService, server: grpc.aio.Server) -> None:
    """What the generated `add_ExpertGroupServicer_to_server` does, with the token loop's messages left serialised."""
    handlers = {
        "Forward": grpc.stream_stream_rpc_method_handler(service.Forward),
        "Load": _unary(service.Load, expert_pb2.LoadRequest, expert_pb2.LoadResponse),
        "Unload": _unary(service.Unload, expert_pb2.UnloadRequest, expert_pb2.UnloadResponse),
        "Status": _unary(service.Status, expert_pb2.ExpertGroupStatusRequest, expert_pb2.ExpertGroupStatusResponse),
    }
    name = expert_pb2.DESCRIPTOR.services_by_name["ExpertGroup"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


def _unary(behaviour: Callable[..., Any], request: Any, response: Any) -> grpc.RpcMethodHandler:
    return grpc.unary_unary_rpc_method_handler(
        behaviour, request_deserializer=request.FromString, response_serializer=response.SerializeToString
    )


def _resident_to_proto(resident: Resident) -> expert_pb2.ResidentBundle:
    return expert_pb2.ResidentBundle(
        digest=resident.digest,
        name=resident.name,
        version=resident.version,
        resident_bytes=resident.resident_bytes,
        kernel=resident.kernel,
        dtype=resident.dtype,
        bundle_dtype=resident.bundle_dtype,
    )
