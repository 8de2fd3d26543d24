"""A client of the Routers for Control, whose requests are pinned to one version. Only evaluations use it."""

import asyncio
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path

import grpc

from echovlm_ray.config import GatewaySection, RouterSection
from echovlm_ray.model.request_processor import RequestProcessor
from echovlm_ray.serving.core.description import ModelDescription
from echovlm_ray.serving.core.parts import GenerateParts
from echovlm_ray.serving.grpc.gateway import GatewayService
from echovlm_ray.serving.grpc.interceptor import CallInterceptor
from echovlm_ray.serving.lm.router_client import RouterClient
from experts.transport.inner_channel import InnerChannels
from protos import echovlm_pb2_grpc, router_pb2

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Pace:
    """A rate limiter for requests. For one event loop."""

    def __init__(self, per_second: float) -> None:
        self._interval_s = 1 / per_second
        self._next = time.monotonic()

    async def turn(self) -> None:
        """Returns when another request may begin."""
        now = time.monotonic()
        begin = max(now, self._next)
        self._next = begin + self._interval_s
        await asyncio.sleep(begin - now)


class PinnedRouterClient(RouterClient):
    """Pins every request to one version of an organ, for any share of traffic."""

    def __init__(
        self,
        addresses: Callable[[], Sequence[str]],
        channels: InnerChannels,
        digest: str,
        pace: Pace,
    ) -> None:
        """Takes what `RouterClient` does, the version's digest, and how often it may ask."""
        super().__init__(addresses, channels)
        self._digest = digest
        self._pace = pace

    async def generate(
        self, request: router_pb2.RouterGenerateRequest, *, deadline: float, request_id: str
    ) -> AsyncGenerator[router_pb2.RouterGenerateResponse, None]:
        await self._pace.turn()
        request.evaluated_bundle = self._digest
        async with aclosing(super().generate(request, deadline=deadline, request_id=request_id)) as messages:
            async for message in messages:
                yield message


@asynccontextmanager
async def answering_version(
    router: RouterClient,
    processor: RequestProcessor,
    describe: Callable[[], ModelDescription],
    gateway: GatewaySection,
    limits: RouterSection,
) -> AsyncIterator[str]:
    """The address of a gateway over a router client, on a socket in a folder that is this user's alone.

    Raises:
        PartUnavailableError: the processes that decode images cannot be started.
    """
    parts = GenerateParts(processor, router, describe, gateway=gateway, limits=limits)
    with tempfile.TemporaryDirectory(prefix="echovlm-gate-") as folder:
        address = f"unix:{Path(folder) / 'gateway'}"
        async with AsyncExitStack() as stack:
            stack.push_async_callback(router.close)
            stack.push_async_callback(parts.close)
            await parts.start()
            server = grpc.aio.server(interceptors=[CallInterceptor(None)], options=UNLIMITED)
            echovlm_pb2_grpc.add_EchoVLMServicer_to_server(GatewayService(parts), server)
            server.add_insecure_port(address)
            await server.start()
            stack.push_async_callback(server.stop, 0)
            yield address
