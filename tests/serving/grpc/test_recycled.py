"""Health checks, which need no credentials: who holds places and does nothing keeps no probe waiting."""

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from echovlm_ray.serving.grpc import health_servicer, received_bytes
from echovlm_ray.serving.grpc.recycled import RecycledPlaces
from tests.serving.grpc.test_limits import LIMIT, Model, bearer, method, prompt, serving, silent, tokens  # noqa: F401
from tests.waiting import until_async

CHECK = "/grpc.health.v1.Health/Check"


def test_a_newcomer_gets_the_oldest_place_of_the_sender_with_the_most() -> None:
    places, ended = RecycledPlaces(3), []
    with ExitStack() as held:

        def come(sender: bytes, name: str) -> None:
            held.enter_context(places.place(sender, lambda: ended.append(name)))

        for sender, name in ((b"a", "a1"), (b"b", "b1"), (b"b", "b2")):
            come(sender, name)
        assert not ended
        come(b"a", "a2")
        # Both would have two; the oldest is that of the newcomer's own sender.
        assert ended == ["a1"]
        come(b"c", "c1")
        assert ended == ["a1", "b1"]
        come(b"c", "c2")
        assert ended == ["a1", "b1", "c1"]
    with places.place(b"d", lambda: ended.append("d1")):
        pass
    assert len(ended) == 3


async def test_checks_whose_messages_do_not_come_keep_no_probe_and_no_caller_waiting(tokens: Path) -> None:  # noqa: F811
    async with (
        serving(Model(), token_file=tokens, max_received_bytes=8 * LIMIT) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        calls: list[Any] = []
        stub = health_pb2_grpc.HealthStub(channel)
        # All come from the same address, without credentials, and go on coming.
        for _ in range(40):
            calls += silent(channel, CHECK, 10)
            await calls[-1].wait_for_connection()
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            assert await method(channel)(prompt("abc"), metadata=bearer("one"), timeout=20)
        await until_async(lambda: sum(call.done() for call in calls) >= len(calls) - received_bytes.CHECKS)
        ended = [call for call in calls if call.done()]
        assert {await call.code() for call in ended} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        texts = [str(await call.details()) for call in ended]
        assert all("had not arrived when others came" in text for text in texts)
        for call in calls:
            call.cancel()


async def test_a_check_whose_message_does_not_come_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received_bytes, "CHECK_WITHIN_S", 0.1)
    async with (
        serving(Model(), max_received_bytes=8 * LIMIT) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        (call,) = silent(channel, CHECK, 1)
        assert await call.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_probe_with_a_token_is_not_replaced_by_others_of_its_address(
    tokens: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health_servicer, "MAX_WATCHERS", 4)
    async with (
        serving(Model(), token_file=tokens) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch
        request = health_pb2.HealthCheckRequest()
        own = watch(request, metadata=bearer("one"))
        assert (await own.read()).status == health_pb2.HealthCheckResponse.SERVING
        # A token that is none does not help.
        others = [watch(request, metadata=bearer("none")) for _ in range(20)]
        for call in others:
            await call.read()
        await until_async(lambda: sum(call.done() for call in others) == 17)
        for call in others[:17]:
            assert await call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "watch again" in str(await call.details())
        await server.set_health("", False)
        for call in (own, others[-1]):
            async with asyncio.timeout(5):
                while (await call.read()).status == health_pb2.HealthCheckResponse.SERVING:
                    pass
        for call in (own, *others):
            call.cancel()
