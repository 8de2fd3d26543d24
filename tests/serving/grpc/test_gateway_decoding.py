"""Decoding seen from a caller of the gateway: a file that costs too much costs no other request."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from echovlm_ray.config import DecodersSection, GatewaySection, RouterSection
from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.vision.decoding.pool import DecoderPool
from protos import echovlm_pb2, router_pb2, router_pb2_grpc
from tests.random_checkpoint import make_random
from tests.serving.gateway_system import GatewaySystem, ScriptedRouter, gateway, served
from tests.vision.decoding.pools import is_gone, large_png, png
from tests.waiting import until_async

LIMITS = RouterSection(max_prompt_tokens=2000, max_new_tokens=200, kv_cache_tokens=8192)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "demo"
    make_random(directory)
    return directory


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> EchoVLMProcessor:
    return EchoVLMProcessor.from_pretrained(checkpoint)


@asynccontextmanager
async def system(
    checkpoint: Path, processor: EchoVLMProcessor, **decoders: Any
) -> AsyncIterator[tuple[GatewaySystem, DecoderPool]]:
    """A gateway whose router ends every answer at once."""
    summary = router_pb2.RouterSummary(finish_reason=router_pb2.FINISH_REASON_STOP)
    router = ScriptedRouter([router_pb2.RouterGenerateResponse(summary=summary)])
    section = GatewaySection(decoders=DecodersSection(**decoders), max_requests=64)
    async with (
        served(router_pb2_grpc.add_RouterServicer_to_server, router, "echovlm.v1.Router") as address,
        gateway(checkpoint, processor, [address], section, LIMITS) as running,
    ):
        assert running.service.decoders is not None
        yield running, running.service.decoders


def report(*images: bytes) -> echovlm_pb2.GenerateRequest:
    files = [echovlm_pb2.ImageFile(content=image) for image in images]
    return echovlm_pb2.GenerateRequest(images=files, task=echovlm_pb2.TASK_REPORT)


TEXT = echovlm_pb2.GenerateRequest(prompt="What is a cyst?")


def stop(pool: DecoderPool) -> None:
    """Has all decoders hang in their next file."""
    for pid in pool.process_ids:
        os.kill(pid, signal.SIGSTOP)


async def test_text_does_not_wait_for_pictures(checkpoint: Path, processor: EchoVLMProcessor) -> None:
    async with system(checkpoint, processor) as (running, pool):
        stop(pool)
        pictures = [running.stub.Generate(report(png()), timeout=60) for _ in range(8)]
        await until_async(lambda: pool.queue_length == 8)
        for _ in range(4):
            await running.stub.Generate(TEXT, timeout=10)
        assert pool.queue_length == 8
        for pid in pool.process_ids:
            os.kill(pid, signal.SIGCONT)
        await asyncio.gather(*pictures)
        assert pool.outcomes == {"ok": 8}


async def test_one_request_takes_one_decoder(checkpoint: Path, processor: EchoVLMProcessor) -> None:
    async with system(checkpoint, processor) as (running, pool):
        first = pool.process_ids[0]
        os.kill(first, signal.SIGSTOP)
        greedy = [running.stub.Generate(report(*[png()] * 8), timeout=60) for _ in range(2)]
        # One of them hangs in its first file, and the other one gets through.
        await asyncio.wait([asyncio.ensure_future(_done(call)) for call in greedy], return_when="FIRST_COMPLETED")
        assert pool.queue_length == 1
        await running.stub.Generate(report(png()), timeout=30)
        os.kill(first, signal.SIGCONT)
        await asyncio.gather(*greedy)


async def _done(call: Any) -> None:
    await call


async def test_a_passed_limit_names_field_and_limit(checkpoint: Path, processor: EchoVLMProcessor) -> None:
    async with system(checkpoint, processor, processes=1, max_cpu_s=0.1) as (running, pool):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.stub.Generate(report(png(), large_png()), timeout=60)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "images[1].content" in str(caught.value.details())
        assert "gateway.decoders.max_cpu_s" in str(caught.value.details())
        await running.stub.Generate(report(png()), timeout=30)
        assert pool.outcomes == {"ok": 2, "limit": 1}


@pytest.mark.parametrize("leave", ["cancel", "deadline"])
async def test_leaving_ends_the_decoding(checkpoint: Path, processor: EchoVLMProcessor, leave: str) -> None:
    async with system(checkpoint, processor, processes=1) as (running, pool):
        (pid,) = pool.process_ids
        stop(pool)
        call = running.stub.Generate(report(png()), timeout=0.5 if leave == "deadline" else 60)
        await until_async(lambda: pool.queue_length == 1)
        await asyncio.sleep(0.1)
        if leave == "cancel":
            call.cancel()
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await call
        await until_async(lambda: is_gone(pid) and pool.queue_length == 0)
        await running.stub.Generate(report(png()), timeout=30)
        assert pool.outcomes == {"cancelled": 1, "ok": 1}


async def test_a_kill_is_logged_with_the_request_and_nothing_of_the_file(
    checkpoint: Path, processor: EchoVLMProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    async with system(checkpoint, processor, processes=1) as (running, pool):
        stop(pool)
        call = running.stub.Generate(report(png()), timeout=60, metadata=(("x-request-id", "case-18"),))
        await until_async(lambda: pool.queue_length == 1)
        await asyncio.sleep(0.1)
        (pid,) = pool.process_ids
        os.kill(pid, signal.SIGSEGV)
        os.kill(pid, signal.SIGCONT)
        with pytest.raises(grpc.aio.AioRpcError):
            await call
    (line,) = [record.getMessage() for record in caplog.records if "decoding" in record.name]
    assert line == f"decoder {pid} is replaced: it ended with SIGSEGV, request id case-18"


async def test_without_a_tokenizer_no_decoder_is_started(checkpoint: Path, processor: EchoVLMProcessor) -> None:
    async with gateway(checkpoint, None, [], GatewaySection(), LIMITS) as running:
        assert running.service.decoders is None
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.stub.Generate(report(png()), timeout=10)
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
