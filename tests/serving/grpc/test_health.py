import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from echovlm_ray.serving.grpc import health
from echovlm_ray.serving.grpc.health import HealthMonitor, organ_service
from echovlm_ray.serving.grpc.server import GrpcServer, ServerOptions

ORGANS = ("breast", "heart")


class Parts:
    """Real servers for the parts, that can be taken away and brought back."""

    def __init__(self) -> None:
        names = (health.ROUTER, health.VISION, health.CONTROL, *map(organ_service, ORGANS))
        self.servers: dict[str, list[GrpcServer]] = {name: [] for name in names}
        self.published: dict[str, bool] = {}
        self.changed = asyncio.Condition()

    async def add(self, name: str) -> GrpcServer:
        server = GrpcServer(ServerOptions())
        await server.start()
        await server.set_health(name, True)
        self.servers[name].append(server)
        return server

    def source(self, name: str) -> Callable[[], Sequence[str]]:
        return lambda: [server.address for server in self.servers[name]]

    async def publish(self, name: str, serving: bool) -> None:
        async with self.changed:
            self.published[name] = serving
            self.changed.notify_all()

    async def until(self, **expected: bool) -> None:
        names = {"overall": health.OVERALL, "model": health.MODEL, "router": health.ROUTER, "vision": health.VISION}
        names |= {"control": health.CONTROL} | {organ: organ_service(organ) for organ in ORGANS}
        async with self.changed, asyncio.timeout(5):
            await self.changed.wait_for(
                lambda: all(self.published[names[name]] is state for name, state in expected.items())
            )


@asynccontextmanager
async def monitored(*, all_organs_needed: bool = False) -> AsyncIterator[tuple[Parts, HealthMonitor]]:
    parts = Parts()
    for name in parts.servers:
        await parts.add(name)
    sources = {name: parts.source(name) for name in parts.servers}
    monitor = HealthMonitor(sources, parts.publish, all_organs_needed=all_organs_needed, speaks_text=True)
    await monitor.start()
    try:
        yield parts, monitor
    finally:
        await monitor.stop()
        for servers in parts.servers.values():
            for server in servers:
                await server.stop(0)


async def test_all_is_well_when_every_part_answers() -> None:
    async with monitored() as (parts, _):
        # The first state is there as soon as the monitor is started.
        assert set(parts.published) == {*parts.servers, health.MODEL, health.OVERALL}
        assert all(parts.published.values())


async def test_one_lost_organ_is_told_and_the_whole_goes_on() -> None:
    async with monitored() as (parts, _):
        await parts.servers[organ_service("heart")][0].stop(0)
        await parts.until(heart=False, breast=True, model=True, overall=True)


async def test_with_one_gate_over_all_organs_the_whole_needs_each() -> None:
    async with monitored(all_organs_needed=True) as (parts, _):
        await parts.servers[organ_service("heart")][0].stop(0)
        await parts.until(heart=False, breast=True, model=False, overall=False)


async def test_an_organ_that_appears_is_published_and_one_that_goes_serves_no_more() -> None:
    parts = Parts()
    for name in parts.servers:
        await parts.add(name)
    live = {organ_service("breast"): parts.source(organ_service("breast"))}
    fixed = {name: parts.source(name) for name in (health.ROUTER, health.VISION, health.CONTROL)}
    monitor = HealthMonitor(
        fixed, parts.publish, all_organs_needed=False, speaks_text=True, live_parts=lambda: dict(live)
    )
    await monitor.start()
    assert organ_service("heart") not in parts.published
    live[organ_service("heart")] = parts.source(organ_service("heart"))
    monitor.wake()
    async with parts.changed, asyncio.timeout(5):
        await parts.changed.wait_for(lambda: parts.published.get(organ_service("heart")))
    del live[organ_service("breast")]
    monitor.wake()
    await parts.until(breast=False, heart=True, overall=True)
    await monitor.stop()
    for servers in parts.servers.values():
        await servers[0].stop(0)


@pytest.mark.parametrize("part", ["router", "vision"])
async def test_the_whole_needs_router_and_vision_encoder(part: str) -> None:
    async with monitored() as (parts, _):
        await parts.servers[{"router": health.ROUTER, "vision": health.VISION}[part]][0].stop(0)
        await parts.until(**{part: False}, model=False, overall=False, breast=True)


async def test_nothing_needs_control() -> None:
    async with monitored() as (parts, _):
        await parts.servers[health.CONTROL][0].stop(0)
        await parts.until(control=False, model=True, overall=True)


async def test_a_part_serves_while_one_of_its_replicas_does() -> None:
    async with monitored() as (parts, _):
        first = parts.servers[health.ROUTER][0]
        await parts.add(health.ROUTER)
        await first.stop(0)
        await asyncio.sleep(1.2)
        await parts.until(router=True, model=True)


async def test_a_replica_that_says_it_does_not_serve_does_not_count() -> None:
    async with monitored() as (parts, _):
        await parts.servers[health.VISION][0].set_health("", False)
        await parts.until(vision=False, model=False)


async def test_an_organ_whose_replica_lacks_its_version_does_not_serve() -> None:
    async with monitored() as (parts, monitor):
        (replica,) = parts.servers[organ_service("heart")]
        await replica.set_health(organ_service("heart"), False)
        await parts.until(heart=False, breast=True, overall=True)
        # Another one that holds it is enough.
        await parts.add(organ_service("heart"))
        monitor.wake()
        await parts.until(heart=True)


async def test_experts_in_the_router_are_as_well_as_the_router_is() -> None:
    parts = Parts()
    for name in (health.ROUTER, health.VISION, health.CONTROL):
        await parts.add(name)
    sources = {name: parts.source(name) for name in (health.ROUTER, health.VISION, health.CONTROL)}
    sources |= {organ_service(organ): parts.source(health.ROUTER) for organ in ORGANS}
    monitor = HealthMonitor(sources, parts.publish, all_organs_needed=False, speaks_text=True, experts_apart=False)
    await monitor.start()
    assert all(parts.published.values())
    await monitor.stop()
    for name in sources:
        for server in parts.servers[name]:
            await server.stop(0)


async def test_a_successor_is_noticed_at_once_when_told_of() -> None:
    async with monitored() as (parts, monitor):
        name = organ_service("heart")
        await parts.servers[name].pop().stop(0)
        monitor.wake()
        await parts.until(heart=False)
        await parts.add(name)
        loop = asyncio.get_running_loop()
        # From another thread, as the endpoints do it.
        await loop.run_in_executor(None, monitor.wake)
        async with asyncio.timeout(health.PERIOD_S / 2):
            await parts.until(heart=True)
