"""Servers between the parts, attacked as another user of the machine would."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from echovlm_ray.serving.grpc.inner_server import inner_server
from echovlm_ray.serving.grpc.server import GrpcServer
from experts.transport.inner_channel import PLAIN_CHANNELS, InnerChannels
from experts.transport.secret import SystemSecret
from protos import control_pb2, control_pb2_grpc, expert_pb2, expert_pb2_grpc

SECRET = SystemSecret.random()
FEED = "echovlm.v1.RolloutFeed"
EXPERTS = "echovlm.v1.ExpertGroup"
STRANGERS = [PLAIN_CHANNELS, InnerChannels(SystemSecret.random()), InnerChannels(SystemSecret(SECRET.text[:-1]))]


class Feed(control_pb2_grpc.RolloutFeedServicer):
    """Counts what reaches it."""

    def __init__(self) -> None:
        self.reached = 0

    async def Report(
        self, request: control_pb2.ReportRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ReportResponse:
        self.reached += 1
        return control_pb2.ReportResponse()

    async def WatchPolicy(
        self, request: control_pb2.WatchPolicyRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.TrafficPolicy]:
        self.reached += 1
        yield control_pb2.TrafficPolicy(version=1)


class Experts(expert_pb2_grpc.ExpertGroupServicer):
    """Answers every message with an empty one."""

    def __init__(self) -> None:
        self.reached = 0

    async def Forward(
        self, requests: AsyncIterator[expert_pb2.ForwardRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[expert_pb2.ForwardResponse]:
        self.reached += 1
        async for request in requests:
            yield expert_pb2.ForwardResponse(correlation_id=request.correlation_id)


@asynccontextmanager
async def running(feed: Feed, experts: Experts, host: str = "127.0.0.1") -> AsyncIterator[GrpcServer]:
    server = inner_server(host, SECRET)
    server.add(control_pb2_grpc.add_RolloutFeedServicer_to_server, feed, FEED)
    server.add(expert_pb2_grpc.add_ExpertGroupServicer_to_server, experts, EXPERTS)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)


async def every_kind_of_call(channel: Any) -> list[grpc.StatusCode]:
    """One call of each kind; how each ended."""

    async def report() -> None:
        await control_pb2_grpc.RolloutFeedStub(channel).Report(control_pb2.ReportRequest(), timeout=10)

    async def watch() -> None:
        async for _ in control_pb2_grpc.RolloutFeedStub(channel).WatchPolicy(
            control_pb2.WatchPolicyRequest(), timeout=10
        ):
            pass

    async def forward() -> None:
        requests = [expert_pb2.ForwardRequest(correlation_id=3)]
        async for response in expert_pb2_grpc.ExpertGroupStub(channel).Forward(iter(requests), timeout=10):
            assert response.correlation_id == 3

    async def health() -> None:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)

    async def reflection() -> None:
        requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
        async for _ in reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter(requests), timeout=10
        ):
            pass

    codes = []
    for call in (report, watch, forward, health, reflection):
        try:
            await call()
            codes.append(grpc.StatusCode.OK)
        except grpc.aio.AioRpcError as error:
            codes.append(error.code())
    return codes


@pytest.mark.parametrize("stranger", STRANGERS)
async def test_no_call_of_a_stranger_reaches_a_servicer(stranger: InnerChannels) -> None:
    feed, experts = Feed(), Experts()
    async with running(feed, experts) as server, stranger.asynchronous(server.address) as channel:
        assert await every_kind_of_call(channel) == [grpc.StatusCode.UNAUTHENTICATED] * 5
    assert feed.reached == experts.reached == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_every_call_of_a_part_does(host: str) -> None:
    feed, experts = Feed(), Experts()
    async with running(feed, experts, host) as server, InnerChannels(SECRET).asynchronous(server.address) as channel:
        assert await every_kind_of_call(channel) == [grpc.StatusCode.OK] * 5
    assert feed.reached == 2
    assert experts.reached == 1


async def test_blocking_channels_carry_the_secret_in_every_way_of_calling() -> None:
    def calls(address: str) -> None:
        with InnerChannels(SECRET).blocking(address) as channel:
            stub = control_pb2_grpc.RolloutFeedStub(channel)
            stub.Report(control_pb2.ReportRequest(), timeout=10)
            stub.Report.future(control_pb2.ReportRequest(), timeout=10).result()
            stub.Report(control_pb2.ReportRequest(), timeout=10, metadata=(("x-request-id", "1"),))

    feed = Feed()
    async with running(feed, Experts()) as server:
        await asyncio.to_thread(calls, server.address)
    assert feed.reached == 3


def test_a_server_between_the_parts_needs_a_secret() -> None:
    with pytest.raises(ValueError, match="needs the system's secret"):
        inner_server("127.0.0.1", SystemSecret(""))


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "ALL_PROXY"])
async def test_a_proxy_of_the_environment_is_passed_by(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    async with running(Feed(), Experts()) as server, InnerChannels(SECRET).asynchronous(server.address) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
