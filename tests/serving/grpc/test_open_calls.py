"""Calls whose answers are not read: how many of one sender there may be, and until when."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from echovlm_ray.config import GatewaySection, RouterSection
from echovlm_ray.serving.grpc import interceptor, open_calls
from echovlm_ray.serving.grpc.gateway import server_options
from echovlm_ray.serving.grpc.open_calls import OpenCalls
from echovlm_ray.serving.grpc.server import GrpcServer
from protos import echovlm_pb2, echovlm_pb2_grpc
from tests.serving.grpc.test_limits import DEAF, Model, bearer, method, prompt, serving, tokens  # noqa: F401
from tests.waiting import until_async


class Peers(Model):
    """Knows by which connections it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.peers: set[str] = set()

    async def Generate(self, request: echovlm_pb2.GenerateRequest, context: Any) -> echovlm_pb2.GenerateResponse:
        self.peers.add(context.peer())
        return echovlm_pb2.GenerateResponse(text="done")

    async def GenerateStream(
        self, request: echovlm_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[echovlm_pb2.GenerateEvent]:
        for _ in range(request.max_new_tokens):
            await asyncio.sleep(0.1)
            yield echovlm_pb2.GenerateEvent(text="x" * 10_000)


def unread(channel: grpc.aio.Channel, count: int, **options: Any) -> list[Any]:
    """Answers that are not read."""
    stub = echovlm_pb2_grpc.EchoVLMStub(channel)
    return [stub.GenerateStream(echovlm_pb2.GenerateRequest(max_new_tokens=50), **options) for _ in range(count)]


def open_of(server: GrpcServer) -> OpenCalls:
    counted = server._interceptor._open_calls
    assert counted is not None
    return counted


async def test_calls_that_are_not_read_end_with_the_age_of_their_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(interceptor, "STALLED_WRITE_S", 0.2)
    model = Model()
    model.places = 100
    async with (
        serving(model, call_limit_s=60.0, connection_s=3.0, connection_grace_s=1.0) as server,
        grpc.aio.insecure_channel(server.address, DEAF) as deaf,
    ):
        counted = open_of(server)
        calls = unread(deaf, 16)
        # They have lost their places, and are still in memory.
        await until_async(lambda: counted.count(b"ipv4:127.0.0.1") == 16 and not model.taken)
        await until_async(lambda: counted.count(b"ipv4:127.0.0.1") == 0)
        assert not counted._open
        assert {await call.code() for call in calls} == {grpc.StatusCode.UNAVAILABLE}
        tasks = {task.get_name() for task in asyncio.all_tasks()}
        assert not any("HandleExceptions" in name for name in tasks)
    assert not [record for record in caplog.records if "failed" in record.message]


async def test_one_connection_after_another_loses_no_call() -> None:
    model = Peers()
    model.places = 100
    async with (
        serving(model, connection_s=0.3, connection_grace_s=10.0) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub = echovlm_pb2_grpc.EchoVLMStub(channel)
        stream = stub.GenerateStream(echovlm_pb2.GenerateRequest(max_new_tokens=20))
        long = asyncio.create_task(_count(stream))
        while not long.done():
            await stub.Generate(echovlm_pb2.GenerateRequest(prompt="abc"))
        assert await long == 20
        assert len(model.peers) >= 3


async def _count(stream: Any) -> int:
    return len([event async for event in stream])


async def test_a_sender_has_so_many_open_calls_and_others_have_theirs(
    tokens: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interceptor, "STALLED_WRITE_S", 0.2)
    monkeypatch.setattr(open_calls, "MAX_OPEN_CALLS", 5)
    model = Model()
    model.places = 100
    async with (
        serving(model, token_file=tokens, call_limit_s=60.0) as server,
        grpc.aio.insecure_channel(server.address, DEAF) as deaf,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        calls = unread(deaf, 5, metadata=bearer("one"))
        await until_async(lambda: sum(open_of(server)._open.values()) == 5 and not model.taken)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await method(channel)(prompt("abc"), metadata=bearer("one"))
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "5 calls of this caller are open" in str(refused.value.details())
        assert await method(channel)(prompt("abc"), metadata=bearer("two"))
        # What is read counts no more, nor what is given up.
        with pytest.raises(grpc.aio.AioRpcError):
            await _count(calls[0])
        for call in calls[1:]:
            call.cancel()
        await until_async(lambda: not open_of(server)._open)
        assert await method(channel)(prompt("abc"), metadata=bearer("one"))


def test_the_gateways_connections_last_longer_than_any_answer() -> None:
    options = server_options(GatewaySection(max_connection_s=60.0), RouterSection(max_request_s=900.0))
    assert (options.connection_s, options.connection_grace_s) == (60.0, 900.0)
