"""The gateway's health service: the live state of every part of the system.

About every second, and at once when a replica appears or is lost, each part's replicas are asked for their own health;
a part is SERVING while one of them says so. A replica of an expert group is asked for its organ's, which serves only
while the replica holds the version that requests get.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from echovlm_ray.serving.grpc.replica_pool import ReplicaPool
from experts.transport.inner_channel import PLAIN_CHANNELS, InnerChannels

PERIOD_S = 1.0
PROBE_TIMEOUT_S = 1.0
OVERALL = ""
MODEL = "echovlm.v1.EchoVLM"
VISION = "echovlm.v1.VisionEncoder"
ROUTER = "echovlm.v1.Router"
CONTROL = "echovlm.v1.ExpertControl"
ORGAN_PREFIX = "echovlm.v1.ExpertGroup/"

Publish = Callable[[str, bool], Awaitable[None]]
Addresses = Callable[[], Sequence[str]]


def organ_service(organ: str) -> str:
    """The health name of an organ's expert group."""
    return f"{ORGAN_PREFIX}{organ}"


class HealthMonitor:
    """Probes the parts and publishes their health, and from it the health of the whole."""

    def __init__(
        self,
        parts: Mapping[str, Addresses],
        publish: Publish,
        *,
        all_organs_needed: bool,
        speaks_text: bool,
        live_parts: Callable[[], Mapping[str, Addresses]] = dict,
        experts_apart: bool = True,
        channels: InnerChannels = PLAIN_CHANNELS,
    ) -> None:
        """
        Args:
            parts: health name → live addresses. Names of organs are those of `organ_service`.
            publish: is called with each name and whether it serves.
            all_organs_needed: with one gate over all organs, every request needs every one of them; otherwise the
                whole serves as long as any organ does.
            speaks_text: false where the checkpoint has no tokenizer: then the parts serve, but not the model.
            live_parts: further parts, that come and go while the system runs. One that went does not serve.
            experts_apart: false where the router computes the experts: then its health is the organs'.
            channels: connects to the parts.
        """
        self._parts = dict(parts)
        self._publish = publish
        self._all_organs_needed = all_organs_needed
        self._speaks_text = speaks_text
        self._live_parts = live_parts
        self._experts_apart = experts_apart
        self._pool: ReplicaPool[grpc.aio.Channel] = ReplicaPool(channels.asynchronous)
        self._published: set[str] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Publishes a first state, then goes on by itself."""
        self._loop = asyncio.get_running_loop()
        await self._round()
        self._task = self._loop.create_task(self._run())

    def wake(self) -> None:
        """Has the parts probed at once; from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake.set)

    async def stop(self) -> None:
        """Ends probing and closes the channels."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._close_all_but(())

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(PERIOD_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            await self._round()

    async def _round(self) -> None:
        parts = {**self._parts, **self._live_parts()}
        live = {name: tuple(addresses()) for name, addresses in parts.items()}
        await self._close_all_but({address for addresses in live.values() for address in addresses})
        states = await asyncio.gather(*[self._any_serves(name, addresses) for name, addresses in live.items()])
        serving = dict(zip(live, states, strict=True))
        organs = [state for name, state in serving.items() if name.startswith(ORGAN_PREFIX)]
        enough_organs = not organs or (all(organs) if self._all_organs_needed else any(organs))
        serving[OVERALL] = serving[ROUTER] and serving[VISION] and enough_organs
        serving[MODEL] = serving[OVERALL] and self._speaks_text
        gone = dict.fromkeys(self._published - set(serving), False)
        self._published |= set(serving)
        for name, state in (serving | gone).items():
            await self._publish(name, state)

    async def _any_serves(self, name: str, addresses: Sequence[str]) -> bool:
        asked = name if self._experts_apart and name.startswith(ORGAN_PREFIX) else OVERALL
        return any(await asyncio.gather(*[self._serves(asked, address) for address in addresses]))

    async def _serves(self, service: str, address: str) -> bool:
        stub = health_pb2_grpc.HealthStub(self._pool.channel(address))
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            response = await stub.Check(request, timeout=PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    async def _close_all_but(self, live: Collection[str]) -> None:
        for channel in self._pool.keep_only(live):
            await channel.close()
