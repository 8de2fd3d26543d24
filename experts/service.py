"""The gRPC face of an expert group: the token loop, and loading and unloading."""

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from google.rpc import code_pb2, status_pb2
from grpc.aio import ServicerContext

from experts.errors import ExpertCapacityError
from experts.group import ExpertGroup, Resident
from experts.transport.codec import tensor_from_proto, tensor_to_proto
from protos import expert_pb2, expert_pb2_grpc

logger = logging.getLogger(__name__)

_Answer = Callable[[expert_pb2.ForwardResponse], Awaitable[None]]


class ExpertGroupService(expert_pb2_grpc.ExpertGroupServicer):
    """Serves one group on a grpc.aio server.

    Exchanges of all streams overlap and are answered as they finish. What goes wrong with one is its answer; the
    stream goes on. When a stream ends its exchanges are dropped: they are pure functions, and the caller sends them
    again elsewhere. Load, Unload and Status raise, and leave the status to the server.
    """

    def __init__(
        self,
        group: ExpertGroup,
        *,
        to_status: Callable[[Exception], status_pb2.Status],
        max_queue: int,
        workers: int = 2,
        inline_multiply_adds: int = 8_000_000,
    ) -> None:
        """Starts the threads that compute.

        Args:
            group: what is served.
            to_status: turns an exception into the status that the caller sees.
            max_queue: when more exchanges than this are received and not yet answered, further ones are refused.
            workers: exchanges computed at the same time.
            inline_multiply_adds: an exchange of at most this many is computed on the event loop when nothing else
                waits. Passing it to a thread and back takes 110 to 160 µs (measured, grpcio 1.85, one thread), while
                a core does this many in less than 1 ms. 0 computes all in threads.
        """
        self._group = group
        self._to_status = to_status
        self._max_queue = max_queue
        self._inline_multiply_adds = inline_multiply_adds
        self._in_flight = 0
        self._received = 0
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=f"experts-{group.organ}")

    @property
    def exchanges_in_flight(self) -> int:
        """Exchanges received and not yet answered."""
        return self._in_flight

    @property
    def exchanges_received(self) -> int:
        """All exchanges since the start, refused ones too."""
        return self._received

    def resident_bundles(self) -> list[expert_pb2.ResidentBundle]:
        """What can be used now, as status shows it."""
        return [_resident_to_proto(resident) for resident in self._group.resident()]

    def close(self) -> None:
        """Stops the threads; for after the server has stopped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def Forward(
        self, request_iterator: AsyncIterator[expert_pb2.ForwardRequest], context: "ServicerContext[Any, Any]"
    ) -> None:
        """The token loop; see the .proto."""
        writing = asyncio.Lock()

        async def answer(response: expert_pb2.ForwardResponse) -> None:
            # gRPC allows one write at a time.
            async with writing:
                await context.write(response)

        async with asyncio.TaskGroup() as exchanges:
            async for request in request_iterator:
                self._received += 1
                if self._in_flight >= self._max_queue:
                    # Awaited here, so that a caller that reads no answers is not read either.
                    await answer(self._refusal(request))
                    continue
                compute_here = self._in_flight == 0 and self._is_small(request)
                self._in_flight += 1
                if compute_here:
                    try:
                        await answer(self._compute(request))
                    finally:
                        self._in_flight -= 1
                else:
                    exchange = exchanges.create_task(self._exchange(request, answer))
                    # Not in the task itself: one that is cancelled before it starts runs nothing.
                    exchange.add_done_callback(self._ended)

    async def Load(
        self, request: expert_pb2.LoadRequest, context: "ServicerContext[Any, Any]"
    ) -> expert_pb2.LoadResponse:
        """Makes a bundle resident; raises what `ExpertGroup.load` raises."""
        resident = await asyncio.to_thread(self._group.load, request.bundle_digest)
        return expert_pb2.LoadResponse(bundle=_resident_to_proto(resident))

    async def Unload(
        self, request: expert_pb2.UnloadRequest, context: "ServicerContext[Any, Any]"
    ) -> expert_pb2.UnloadResponse:
        """Forgets a bundle once its exchanges have ended."""
        await asyncio.to_thread(self._group.unload, request.bundle_digest)
        return expert_pb2.UnloadResponse()

    async def Status(
        self, request: expert_pb2.ExpertGroupStatusRequest, context: "ServicerContext[Any, Any]"
    ) -> expert_pb2.ExpertGroupStatusResponse:
        """What is resident."""
        return expert_pb2.ExpertGroupStatusResponse(
            organ=self._group.organ,
            bundles=self.resident_bundles(),
            exchanges_in_flight=self._in_flight,
        )

    async def _exchange(self, request: expert_pb2.ForwardRequest, answer: _Answer) -> None:
        await answer(await asyncio.get_running_loop().run_in_executor(self._pool, self._compute, request))

    def _ended(self, exchange: asyncio.Task[None]) -> None:
        self._in_flight -= 1

    def _is_small(self, request: expert_pb2.ForwardRequest) -> bool:
        parameters = self._group.parameters_per_expert(request.bundle_digest)
        # int32: four bytes a pair.
        return parameters is not None and parameters * len(request.expert_index.data) // 4 <= self._inline_multiply_adds

    def _compute(self, request: expert_pb2.ForwardRequest) -> expert_pb2.ForwardResponse:
        try:
            output_TD = self._group.forward(
                request.bundle_digest,
                request.layer,
                tensor_from_proto(request.hidden_states, "hidden_states"),
                tensor_from_proto(request.expert_index, "expert_index"),
                tensor_from_proto(request.weight, "weight"),
            )
            return expert_pb2.ForwardResponse(correlation_id=request.correlation_id, output=tensor_to_proto(output_TD))
        except Exception as error:
            return self._failure(request, error)

    def _refusal(self, request: expert_pb2.ForwardRequest) -> expert_pb2.ForwardResponse:
        reason = (
            f"the expert group of {self._group.organ!r} has {self._in_flight} exchanges waiting, its limit "
            f"max_queue = {self._max_queue}; send this one again later or to another replica"
        )
        return self._failure(request, ExpertCapacityError(reason))

    def _failure(self, request: expert_pb2.ForwardRequest, error: Exception) -> expert_pb2.ForwardResponse:
        status = self._to_status(error)
        if status.code == code_pb2.INTERNAL:
            # The places in the code, not the exception's text: that may show what was computed.
            logger.error(
                "an exchange with bundle %.64s, layer %d failed: %s\n%s",
                request.bundle_digest,
                request.layer,
                type(error).__name__,
                "".join(traceback.format_tb(error.__traceback__)),
            )
        return expert_pb2.ForwardResponse(correlation_id=request.correlation_id, error=status)


def _resident_to_proto(resident: Resident) -> expert_pb2.ResidentBundle:
    return expert_pb2.ResidentBundle(
        digest=resident.digest,
        name=resident.name,
        version=resident.version,
        resident_bytes=resident.resident_bytes,
        kernel=resident.kernel,
    )
