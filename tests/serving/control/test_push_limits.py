"""Pushes that send nothing do not keep others from the registry."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from echovlm_ray.errors import InvalidRequestError, OverloadedError
from echovlm_ray.serving.control.push import MAX_PUSHES, MAX_PUSHES_OF_ONE, PushReceiver
from echovlm_ray.serving.core.caller import Caller, set_caller
from echovlm_ray.serving.grpc.server import GrpcServer, ServerOptions
from experts.registry.registry import Registry
from protos import control_pb2, control_pb2_grpc


@pytest.fixture
def pushes(tmp_path: Path) -> PushReceiver:
    return PushReceiver(Registry(tmp_path / "registry"), tmp_path / "incoming", 10**9)


async def nothing() -> AsyncIterator[control_pb2.PushRequest]:
    return
    yield control_pb2.PushRequest()


async def silence() -> AsyncIterator[control_pb2.PushRequest]:
    await asyncio.Event().wait()
    yield control_pb2.PushRequest()


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
