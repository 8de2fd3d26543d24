"""A change is done when every Router and gateway applies it; until then Control's answer waits, for a bounded time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from echovlm_ray.checkpoint.layout import registry_root
from experts.registry.registry import Registry
from protos import control_pb2
from tests.changed_bundles import changed_bundle
from tests.expert_servers import server_thread
from tests.random_checkpoint import make_random
from tests.serving.control_system import ControlSystem, control_system, live_set

WHO: dict[str, Any] = {"actor": "tests", "reason": "to see"}


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[ControlSystem]:
    checkpoint = tmp_path / "demo"
    make_random(checkpoint)
    registry = Registry(registry_root(checkpoint))
    heart = registry.open(live_set(checkpoint).bundle_digest("heart"))
    changed_bundle(tmp_path / "next", heart, "1.1.0")
    registry.push(tmp_path / "next")
    with server_thread() as servers:
        async with control_system(checkpoint, tmp_path / "state", servers) as system:
            await system.stub.Stage(control_pb2.StageRequest(organ="heart", version="1.1.0", **WHO))
            await system.until("heart", "warm")
            yield system


@dataclass
class Watcher:
    """A Router or gateway as Control's watcher."""

    system: ControlSystem
    name: str
    policies: list[control_pb2.TrafficPolicy]

    async def acknowledge(self) -> None:
        """Acknowledges the newest policy."""
        version = self.policies[-1].version
        await self.system.feed.TakenUp(control_pb2.TakenUpRequest(watcher=self.name, policy_version=version))

    async def receives(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.policies) < count:
                await asyncio.sleep(0.005)


@asynccontextmanager
async def watching(system: ControlSystem, kind: str, name: str) -> AsyncIterator[Watcher]:
    request = control_pb2.WatchPolicyRequest(router=name if kind == "router" else "")
    if kind == "gateway":
        request.gateway = name
    call = system.feed.WatchPolicy(request)
    watcher = Watcher(system, name, [])

    async def follow() -> None:
        async for policy in call:
            watcher.policies.append(policy)

    task = asyncio.create_task(follow())
    await watcher.receives(1)
    await watcher.acknowledge()
    try:
        yield watcher
    finally:
        call.cancel()
        await asyncio.gather(task, return_exceptions=True)


def promote(system: ControlSystem, **fields: Any) -> "asyncio.Task[control_pb2.OperationResponse]":
    async def call() -> control_pb2.OperationResponse:
        response: control_pb2.OperationResponse = await system.stub.Promote(
            control_pb2.OrganRequest(organ="heart", **WHO, **fields)
        )
        return response

    return asyncio.create_task(call())


async def test_promote_answers_when_router_and_gateway_have_taken_it_up(system: ControlSystem) -> None:
    system.running |= {"router": 1, "gateway": 1}
    async with watching(system, "router", "router-a") as router, watching(system, "gateway", "gateway-a") as gateway:
        response = promote(system)
        await router.receives(2)
        await gateway.receives(2)
        await router.acknowledge()
        await asyncio.sleep(0.1)
        assert not response.done(), "the gateway has not said so yet"
        await gateway.acknowledge()
        answer = await response
        assert (answer.changed, list(answer.not_taken_up)) == (True, [])
        # Again, as after a connection that broke: the same, at once.
        again = await promote(system)
        assert (again.changed, list(again.not_taken_up)) == (False, [])


async def test_those_that_do_not_take_it_up_in_time_are_named(system: ControlSystem) -> None:
    system.running |= {"router": 2, "gateway": 1}
    async with watching(system, "router", "router-a") as router, watching(system, "gateway", "gateway-a") as gateway:
        response = promote(system)
        await gateway.receives(2)
        await gateway.acknowledge()
        answer = await response
        expected = ["router-a does not apply it yet", "1 of 2 routers not connected to Control"]
        assert list(answer.not_taken_up) == expected
        state = await anext(aiter(system.stub.Watch(control_pb2.WatchRequest())))
        assert list(state.not_taken_up) == expected
        await router.acknowledge()
        system.running["router"] = 1
        state = await anext(aiter(system.stub.Watch(control_pb2.WatchRequest())))
        assert not state.not_taken_up


async def test_a_router_that_goes_is_not_waited_for_and_one_that_applies_another_policy_is(
    system: ControlSystem,
) -> None:
    async with watching(system, "router", "router-a") as stays:
        async with watching(system, "router", "router-b") as goes:
            response = promote(system)
            await stays.receives(2)
            await goes.receives(2)
            # Of an earlier database, larger than any of this one.
            await system.feed.TakenUp(control_pb2.TakenUpRequest(watcher="router-a", policy_version=10**6))
            await asyncio.sleep(0.05)
            assert not response.done()
            await stays.acknowledge()
        assert list((await response).not_taken_up) == []


async def test_what_changes_no_policy_does_not_wait(system: ControlSystem) -> None:
    system.running["router"] = 1
    for response in (
        await promote(system, dry_run=True),
        await system.stub.Stage(control_pb2.StageRequest(organ="heart", version="1.1.0", **WHO)),
    ):
        assert not response.not_taken_up
