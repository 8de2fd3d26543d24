"""Pushes that send nothing do not keep others from the registry."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from echovlm_ray.errors import DeadlineError, InvalidRequestError, OverloadedError
from echovlm_ray.serving.control import push
from echovlm_ray.serving.control.push import MAX_PUSHES, MAX_PUSHES_OF_ONE, RESERVED_PUSHES, PushReceiver
from echovlm_ray.serving.core.caller import Caller, set_caller
from echovlm_ray.serving.grpc.server import GrpcServer, ServerOptions
from experts.registry.registry import Registry
from protos import control_pb2, control_pb2_grpc
from tests.experts.manifest_fields import FIELDS


@pytest.fixture
def pushes(tmp_path: Path) -> PushReceiver:
    return PushReceiver(Registry(tmp_path / "registry"), tmp_path / "incoming", 10**9)


async def nothing() -> AsyncIterator[control_pb2.PushRequest]:
    return
    yield control_pb2.PushRequest()


async def silence() -> AsyncIterator[control_pb2.PushRequest]:
    await asyncio.Event().wait()
    yield control_pb2.PushRequest()


def manifest_of(size: int) -> bytes:
    """Of a bundle whose first file has so many bytes."""
    files = [
        {"path": "experts.safetensors", "sha256": "1" * 64, "size": size},
        {"path": "gate.safetensors", "sha256": "2" * 64, "size": 1},
    ]
    return json.dumps(FIELDS | {"files": files}).encode()


def receiving(pushes: PushReceiver, caller: bytes, requests: Callable[[], Any]) -> asyncio.Task[Any]:
    async def receive() -> Any:
        set_caller(Caller(caller))
        return await pushes.receive(requests())

    return asyncio.create_task(receive())


async def test_one_operators_pushes_leave_room_for_anothers(pushes: PushReceiver) -> None:
    silent = [receiving(pushes, b"one", silence) for _ in range(MAX_PUSHES_OF_ONE)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="with these credentials already"):
        await receiving(pushes, b"one", nothing)
    with pytest.raises(InvalidRequestError, match="nothing came"):
        await receiving(pushes, b"two", nothing)
    others = [receiving(pushes, b"%d" % index, silence) for index in range(MAX_PUSHES - MAX_PUSHES_OF_ONE)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match=f"{MAX_PUSHES} bundles are being pushed already"):
        await receiving(pushes, b"two", nothing)
    for task in (*silent, *others):
        task.cancel()
    await asyncio.gather(*silent, *others, return_exceptions=True)
    with pytest.raises(InvalidRequestError, match="nothing came"):
        await receiving(pushes, b"one", nothing)


async def test_the_last_places_are_for_operators_that_push_nothing_else(pushes: PushReceiver) -> None:
    names = [b"%d" % (index // MAX_PUSHES_OF_ONE) for index in range(MAX_PUSHES - RESERVED_PUSHES)]
    silent = [receiving(pushes, name, silence) for name in names]
    silent += [receiving(pushes, b"another", silence)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="13 bundles are being pushed already, 1 with these credentials"):
        await receiving(pushes, b"another", nothing)
    with pytest.raises(InvalidRequestError, match="nothing came"):
        await receiving(pushes, b"two", nothing)
    for task in silent:
        task.cancel()
    await asyncio.gather(*silent, return_exceptions=True)


async def test_a_push_of_a_byte_now_and_then_ends(tmp_path: Path) -> None:
    pushes = PushReceiver(Registry(tmp_path / "registry"), tmp_path / "incoming", 10**9, idle_s=0.1)

    async def drip() -> AsyncIterator[control_pb2.PushRequest]:
        yield control_pb2.PushRequest(manifest=manifest_of(1000))
        yield control_pb2.PushRequest(file="experts.safetensors")
        while True:
            await asyncio.sleep(0.02)
            yield control_pb2.PushRequest(data=b"x")

    with pytest.raises(DeadlineError, match=r"only \d+ bytes were sent in 0.1 seconds, and 65536 must be"):
        await asyncio.wait_for(receiving(pushes, b"one", drip), 10)


async def test_a_push_that_is_written_slowly_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushes = PushReceiver(Registry(tmp_path / "registry"), tmp_path / "incoming", 10**9, idle_s=0.05)
    write = push._Writing.write

    def slow(writing: push._Writing, data: bytes) -> None:
        time.sleep(0.1)
        write(writing, data)

    monkeypatch.setattr(push._Writing, "write", slow)

    async def pieces() -> AsyncIterator[control_pb2.PushRequest]:
        yield control_pb2.PushRequest(manifest=manifest_of(4))
        yield control_pb2.PushRequest(file="experts.safetensors")
        for _ in range(3):
            yield control_pb2.PushRequest(data=b"x")

    with pytest.raises(InvalidRequestError, match="ended after 3 of 4 bytes"):
        await receiving(pushes, b"one", pieces)


async def test_a_push_that_finds_no_place_is_read_for_a_moment_so_that_its_sender_learns_why(
    pushes: PushReceiver,
) -> None:
    silent = [receiving(pushes, b"one", silence) for _ in range(MAX_PUSHES_OF_ONE)]
    await asyncio.sleep(0)
    read = []

    async def pieces() -> AsyncIterator[control_pb2.PushRequest]:
        for number in range(3):
            read.append(number)
            yield control_pb2.PushRequest(data=b"x")

    with pytest.raises(OverloadedError):
        await receiving(pushes, b"one", pieces)
    assert read == [0, 1, 2]
    for task in silent:
        task.cancel()
    await asyncio.gather(*silent, return_exceptions=True)


async def test_a_push_that_sends_nothing_ends(pushes: PushReceiver) -> None:
    class Control(control_pb2_grpc.ExpertControlServicer):
        async def Push(self, request_iterator: Any, context: Any) -> control_pb2.PushResponse:
            await pushes.receive(request_iterator)
            return control_pb2.PushResponse()

    server = GrpcServer(ServerOptions(max_receive_bytes=10**6, max_received_bytes=10**7, idle_s=0.2))
    server.add(control_pb2_grpc.add_ExpertControlServicer_to_server, Control(), "echovlm.v1.ExpertControl")
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = control_pb2_grpc.ExpertControlStub(channel).Push()
        await call.wait_for_connection()
        async with asyncio.timeout(10):
            assert await call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            assert await call.details() == "nothing was sent for 0.2 seconds"
    await server.stop(0)
