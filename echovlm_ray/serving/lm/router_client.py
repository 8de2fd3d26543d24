"""How the gateway reaches the routers: the least busy one first, another one when that is lost before it answered."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

import grpc

from echovlm_ray.errors import DeadlineError, PartUnavailableError
from echovlm_ray.serving.core.failures import ORGAN_PENDING, SHUTTING_DOWN, PartRefusedError
from echovlm_ray.serving.grpc.absence import Absence
from echovlm_ray.serving.grpc.errors import failure_of_call, said_by_part
from echovlm_ray.serving.grpc.replica_pool import ReplicaPool
from echovlm_ray.serving.grpc.request_id import REQUEST_ID_KEY
from experts.transport.inner_channel import PLAIN_CHANNELS, InnerChannels
from protos import router_pb2, router_pb2_grpc

RETRY_INTERVAL_S = 0.2
# A killed replica is back after about two seconds; a request that waits for longer than this should hear so.
RETRY_FOR_S = 15.0
PART = "the router"
LOST = "the replica was lost before it answered"


class RouterClient:
    """Streams tokens from whichever router replica is least busy.

    Experts are pure functions, so sending a request again is always safe; but a caller has seen the tokens that came,
    so only a stream that has not begun is sent again.
    """

    def __init__(self, addresses: Callable[[], Sequence[str]], channels: InnerChannels = PLAIN_CHANNELS) -> None:
        """`addresses` gives the live replicas at any time, and `channels` connects to them."""
        self._addresses = addresses
        self._pool: ReplicaPool[grpc.aio.Channel] = ReplicaPool(channels.asynchronous)
        self._absence = Absence(RETRY_FOR_S)

    async def generate(
        self, request: router_pb2.RouterGenerateRequest, *, deadline: float, request_id: str
    ) -> AsyncGenerator[router_pb2.RouterGenerateResponse, None]:
        """The router's messages for one request. Closing the generator cancels the request.

        Args:
            request: token ids and patches.
            deadline: in `time.monotonic` seconds.
            request_id: sent along, so that both logs have it.

        Raises:
            PartUnavailableError: no router answered in time, or one was lost in the middle of an answer.
            DeadlineError: the answer was not complete in time.
            PartRefusedError: the router refused or failed the request, and said so.
        """
        give_up = min(deadline, time.monotonic() + RETRY_FOR_S)
        lost: Counter[str] = Counter()
        while True:
            reason = "no replica is running"
            address = self._pool.least_busy(self._addresses(), lost)
            if address is None:
                give_up = min(give_up, self._absence.ends())
            else:
                self._absence.is_over()
                begun = False
                try:
                    async with aclosing(self._call(address, request, deadline, request_id)) as messages:
                        async for message in messages:
                            begun = True
                            yield message
                    return
                except grpc.aio.AioRpcError as error:
                    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                        raise DeadlineError("the deadline passed before the answer was complete") from error
                    if not _is_passing(error):
                        raise PartRefusedError(failure_of_call(error)) from error
                    if begun:
                        raise PartUnavailableError(PART, "the replica was lost during the answer") from error
                    said = said_by_part(error)
                    reason = LOST if said is None or said.reason != ORGAN_PENDING else said.text
                    lost[address] += 1
            if time.monotonic() + RETRY_INTERVAL_S >= give_up:
                raise PartUnavailableError(PART, reason)
            await asyncio.sleep(RETRY_INTERVAL_S)

    async def close(self) -> None:
        """Closes all channels."""
        for channel in self._pool.keep_only(()):
            await channel.close()

    async def _call(
        self, address: str, request: router_pb2.RouterGenerateRequest, deadline: float, request_id: str
    ) -> AsyncGenerator[router_pb2.RouterGenerateResponse, None]:
        with self._pool.call(address) as channel:
            call = router_pb2_grpc.RouterStub(channel).Generate(
                request,
                timeout=max(0.0, deadline - time.monotonic()),
                metadata=((REQUEST_ID_KEY, request_id),),
            )
            try:
                async for message in call:
                    yield message
            finally:
                call.cancel()


def _is_passing(error: grpc.aio.AioRpcError) -> bool:
    """Whether a replica went away or is about to know a new organ, rather than saying that a part behind it is lost."""
    if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return False
    said = said_by_part(error)
    return said is None or said.reason in (SHUTTING_DOWN, ORGAN_PENDING)
