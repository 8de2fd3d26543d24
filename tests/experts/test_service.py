"""The service on a real grpc.aio server, with the system's own mapping of errors."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import code_pb2

from echovlm_ray.serving.grpc.errors import to_status
from echovlm_ray.serving.grpc.interceptor import CallInterceptor
from experts.bundles.bundle import Bundle
from experts.bundles.manifest import Manifest
from experts.group import ExpertGroup
from experts.kernels.base import ExpertWeights
from experts.kernels.reference import ReferenceExperts, ReferenceKernel
from experts.registry.registry import Registry
from experts.service import ExpertGroupService, add_expert_group_to_server
from experts.transport.codec import tensor_from_proto, tensor_to_proto
from protos import expert_pb2, expert_pb2_grpc, tensor_pb2

MakeBundle = Callable[..., Path]
Serve = Callable[..., Any]
# Anything slower than this hangs.
TIMEOUT_S = 20


class DoorKernel(ReferenceKernel):
    """The reference kernel; exchanges of more than `threshold` tokens wait at a door."""

    def __init__(self, threshold: int = 10) -> None:
        self.door, self.waiting = threading.Event(), threading.Semaphore(0)
        self.threshold = threshold

    def load(self, weights: ExpertWeights) -> ReferenceExperts:
        kernel = self

        class Waiting(ReferenceExperts):
            def forward(self, x_TD: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
                if x_TD.shape[0] > kernel.threshold:
                    kernel.waiting.release()
                    assert kernel.door.wait(TIMEOUT_S)
                return super().forward(x_TD, *rest)

        return Waiting(weights)

    async def until_waiting(self) -> None:
        assert await asyncio.to_thread(self.waiting.acquire, timeout=TIMEOUT_S)


class Served:
    """A running server and a client of it."""

    def __init__(self, service: ExpertGroupService, server: grpc.aio.Server, channel: grpc.aio.Channel) -> None:
        self.service, self.server, self.channel = service, server, channel
        self.stub = expert_pb2_grpc.ExpertGroupStub(channel)


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    running: list[Served] = []

    async def start(
        group: ExpertGroup,
        *,
        unix: bool = False,
        max_queue: int = 64,
        workers: int = 2,
        inline_multiply_adds: int = 0,
    ) -> Served:
        service = ExpertGroupService(
            group,
            to_status=to_status,
            max_queue=max_queue,
            workers=workers,
            inline_multiply_adds=inline_multiply_adds,
        )
        server = grpc.aio.server(interceptors=[CallInterceptor()])
        add_expert_group_to_server(service, server)
        address = f"unix:{tmp_path}/socket" if unix else "127.0.0.1:0"
        port = server.add_insecure_port(address)
        await server.start()
        served = Served(service, server, grpc.aio.insecure_channel(address if unix else f"127.0.0.1:{port}"))
        running.append(served)
        return served

    yield start
    for served in running:
        await served.channel.close()
        await served.server.stop(0)
        served.service.close()


@pytest.fixture
def kernel() -> DoorKernel:
    return DoorKernel()


@pytest.fixture
def door_group(kernel: DoorKernel, registry: Registry, pushed: Manifest) -> ExpertGroup:
    group = ExpertGroup("breast", registry, kernel, device="cpu", max_resident_bytes=10**8)
    group.load(pushed.digest)
    return group


def inputs(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn((tokens, 16), generator=generator),
        torch.randint(-1, 3, (tokens, 2), generator=generator, dtype=torch.int32),
        torch.rand((tokens, 2), generator=generator),
    )


def request(
    digest: str, correlation_id: int, tokens: int = 4, layer: int = 0, **changes: Any
) -> expert_pb2.ForwardRequest:
    x_TD, index_TK, weight_TK = inputs(tokens)
    fields = {
        "expert_index": tensor_to_proto(index_TK),
        "weight": tensor_to_proto(weight_TK),
        "hidden_states": tensor_to_proto(x_TD),
        **changes,
    }
    return expert_pb2.ForwardRequest(correlation_id=correlation_id, bundle_digest=digest, layer=layer, **fields)


async def read(call: Any) -> expert_pb2.ForwardResponse:
    response = await asyncio.wait_for(call.read(), TIMEOUT_S)
    assert response is not grpc.aio.EOF
    return response  # type: ignore[no-any-return]


@pytest.mark.parametrize("unix", [False, True])
@pytest.mark.parametrize("inline_multiply_adds", [0, 10**9])
async def test_answers_are_those_of_the_group_to_the_last_bit(
    unix: bool, inline_multiply_adds: int, serve: Serve, group: ExpertGroup, pushed: Manifest
) -> None:
    group.load(pushed.digest)
    served = await serve(group, unix=unix, inline_multiply_adds=inline_multiply_adds)
    call = served.stub.Forward()
    expected = {}
    for number, (tokens, layer) in enumerate([(1, 0), (1, 1), (7, 0), (0, 1), (300, 1)]):
        expected[number] = group.forward(pushed.digest, layer, *inputs(tokens))
        await call.write(request(pushed.digest, number, tokens, layer))
    await call.done_writing()
    for _ in range(len(expected)):
        response = await read(call)
        assert not response.HasField("error")
        output = tensor_from_proto(response.output)
        assert torch.equal(output, expected.pop(response.correlation_id))
    assert not expected
    assert await asyncio.wait_for(call.read(), TIMEOUT_S) is grpc.aio.EOF
    assert await call.code() == grpc.StatusCode.OK
    assert served.service.exchanges_in_flight == 0


async def test_exchanges_overlap_and_are_answered_as_they_finish(
    serve: Serve, door_group: ExpertGroup, kernel: DoorKernel, pushed: Manifest
) -> None:
    served = await serve(door_group)
    call, other = served.stub.Forward(), served.stub.Forward()
    await call.write(request(pushed.digest, 1, tokens=50))
    await kernel.until_waiting()
    await call.write(request(pushed.digest, 2))
    assert (await read(call)).correlation_id == 2
    await other.write(request(pushed.digest, 1))
    assert (await read(other)).correlation_id == 1, "another stream is not held up either"
    status = await served.stub.Status(expert_pb2.ExpertGroupStatusRequest(), timeout=TIMEOUT_S)
    assert status.exchanges_in_flight == served.service.exchanges_in_flight == 1
    kernel.door.set()
    response = await read(call)
    assert response.correlation_id == 1
    assert torch.equal(tensor_from_proto(response.output), door_group.forward(pushed.digest, 0, *inputs(50)))


async def test_small_exchanges_wait_for_no_large_one(
    serve: Serve, door_group: ExpertGroup, kernel: DoorKernel, pushed: Manifest
) -> None:
    """A large one is computed in a thread, and while it is there small ones are too."""
    served = await serve(door_group, inline_multiply_adds=3 * 16 * 24 * 2 * 10)
    call = served.stub.Forward()
    await call.write(request(pushed.digest, 1, tokens=11))
    await kernel.until_waiting()
    await call.write(request(pushed.digest, 2, tokens=10))
    assert (await read(call)).correlation_id == 2
    kernel.door.set()
    assert (await read(call)).correlation_id == 1


FLOAT = tensor_pb2.DATA_TYPE_FLOAT32


@pytest.mark.parametrize("inline_multiply_adds", [0, 10**9])
async def test_a_bad_exchange_is_answered_and_the_stream_goes_on(
    inline_multiply_adds: int, serve: Serve, group: ExpertGroup, pushed: Manifest
) -> None:
    group.load(pushed.digest)
    served = await serve(group, inline_multiply_adds=inline_multiply_adds)
    call = served.stub.Forward()
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"digest": "0" * 64}, code_pb2.FAILED_PRECONDITION, "not loaded"),
        ({"digest": "x" * 100_000}, code_pb2.FAILED_PRECONDITION, "not loaded"),
        ({"layer": 99}, code_pb2.INVALID_ARGUMENT, "layers 0 to 1"),
        ({"hidden_states": None}, code_pb2.INVALID_ARGUMENT, "hidden_states.dtype is 0"),
        ({"expert_index": None}, code_pb2.INVALID_ARGUMENT, "expert_index.dtype is 0"),
        ({"weight": None}, code_pb2.INVALID_ARGUMENT, "weight.dtype is 0"),
        (
            {"hidden_states": tensor_pb2.Tensor(dtype=FLOAT, shape=[-4, 16])},
            code_pb2.INVALID_ARGUMENT,
            "hidden_states.shape is [-4, 16]; sizes cannot be negative",
        ),
        (
            {"hidden_states": tensor_pb2.Tensor(dtype=FLOAT, shape=[2**50, 16])},
            code_pb2.INVALID_ARGUMENT,
            "at most",
        ),
        (
            {"hidden_states": tensor_pb2.Tensor(dtype=FLOAT, shape=[4, 16], data=b"short")},
            code_pb2.INVALID_ARGUMENT,
            "has 5 bytes",
        ),
        (
            {"expert_index": tensor_to_proto(torch.full((4, 2), 3, dtype=torch.int32))},
            code_pb2.INVALID_ARGUMENT,
            "experts 0 to 2",
        ),
        ({"weight": tensor_to_proto(torch.ones(4, 3))}, code_pb2.INVALID_ARGUMENT, "weight is"),
    ]
    for number, (changes, code, reason) in enumerate(cases, start=1):
        changes = dict(changes)
        await call.write(request(changes.pop("digest", pushed.digest), number, **changes))
        response = await read(call)
        assert (response.correlation_id, response.error.code) == (number, code)
        assert reason in response.error.message
        assert len(response.error.message) < 1000
        assert not response.HasField("output")
    await call.write(request(pushed.digest, 2**64 - 1))
    response = await read(call)
    assert response.correlation_id == 2**64 - 1
    assert torch.equal(tensor_from_proto(response.output), group.forward(pushed.digest, 0, *inputs(4)))


async def test_what_is_no_request_ends_its_stream_alone(serve: Serve, group: ExpertGroup, pushed: Manifest) -> None:
    group.load(pushed.digest)
    served = await serve(group)
    call = served.stub.Forward()
    garbage = served.channel.stream_stream("/echovlm.v1.ExpertGroup/Forward")()
    await garbage.write(b"\xff\xff\xff")
    with pytest.raises(grpc.aio.AioRpcError, match="no ForwardRequest") as failure:
        await garbage.read()
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    await call.write(request(pushed.digest, 1))
    assert not (await read(call)).HasField("error")


async def test_memory_is_shared_on_the_unix_socket_only(serve: Serve, group: ExpertGroup, pushed: Manifest) -> None:
    group.load(pushed.digest)
    served = await serve(group)
    call = served.stub.Forward()
    shared = expert_pb2.SharedTensors(offset=64, dtype=FLOAT, tokens=1, hidden_size=16, top_k=1)
    await call.write(expert_pb2.ForwardRequest(correlation_id=1, bundle_digest=pushed.digest, shared=shared))
    response = await read(call)
    assert response.error.code == code_pb2.INVALID_ARGUMENT
    assert "no memory is shared here" in response.error.message
    status = await served.stub.Status(expert_pb2.ExpertGroupStatusRequest())
    assert Path(status.local_socket).is_socket()
    assert len(status.instance) == 32


async def test_a_full_queue_refuses_and_disturbs_nothing(
    serve: Serve, door_group: ExpertGroup, kernel: DoorKernel, pushed: Manifest
) -> None:
    served = await serve(door_group, max_queue=3, workers=1)
    call = served.stub.Forward()
    for number in range(3):
        await call.write(request(pushed.digest, number, tokens=11 + number))
    await kernel.until_waiting()
    for number in range(3, 6):
        await call.write(request(pushed.digest, number))
        response = await read(call)
        assert (response.correlation_id, response.error.code) == (number, code_pb2.RESOURCE_EXHAUSTED)
        assert "max_queue = 3" in response.error.message
    assert served.service.exchanges_in_flight == 3
    kernel.door.set()
    for _ in range(3):
        response = await read(call)
        expected = door_group.forward(pushed.digest, 0, *inputs(11 + response.correlation_id))
        assert torch.equal(tensor_from_proto(response.output), expected)
    await call.write(request(pushed.digest, 7))
    assert not (await read(call)).HasField("error")


async def test_a_defect_is_answered_without_its_text_and_logged_without_it(
    serve: Serve, registry: Registry, pushed: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    broken: list[bool] = []

    class Broken(ReferenceKernel):
        def load(self, weights: ExpertWeights) -> ReferenceExperts:
            class Fails(ReferenceExperts):
                def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
                    if broken:
                        raise RuntimeError("patient 12345")
                    return super().forward(*arguments)

            return Fails(weights)

    group = ExpertGroup("breast", registry, Broken(), device="cpu", max_resident_bytes=10**8)
    group.load(pushed.digest)
    broken.append(True)
    served = await serve(group)
    call = served.stub.Forward()
    with caplog.at_level(logging.DEBUG):
        await call.write(request(pushed.digest, 1))
        response = await read(call)
    assert response.error.code == code_pb2.INTERNAL
    assert "12345" not in response.error.message
    assert "RuntimeError" in caplog.text
    assert "in forward" in caplog.text
    assert "12345" not in caplog.text.replace('raise RuntimeError("patient 12345")', "")


@pytest.mark.parametrize("ending", ["cancel", "disconnect"])
async def test_a_caller_that_leaves_takes_its_exchanges_with_it(
    ending: str,
    serve: Serve,
    door_group: ExpertGroup,
    kernel: DoorKernel,
    pushed: Manifest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    served = await serve(door_group, workers=1)
    call = served.stub.Forward()
    for number in range(5):
        await call.write(request(pushed.digest, number, tokens=11))
    await kernel.until_waiting()
    while served.service.exchanges_in_flight < 5:
        await asyncio.sleep(0.001)
    with caplog.at_level(logging.WARNING):
        if ending == "cancel":
            call.cancel()
        else:
            await served.channel.close()
        async with asyncio.timeout(TIMEOUT_S):
            while served.service.exchanges_in_flight:
                await asyncio.sleep(0.001)
        kernel.door.set()
        await asyncio.sleep(0.05)
    assert caplog.records == []
    # The four that had not begun were never computed.
    assert not kernel.waiting.acquire(blocking=False)


async def test_the_server_goes_on_after_a_cancelled_stream(
    serve: Serve, door_group: ExpertGroup, kernel: DoorKernel, pushed: Manifest
) -> None:
    served = await serve(door_group, workers=2)
    gone = served.stub.Forward()
    await gone.write(request(pushed.digest, 1, tokens=11))
    await kernel.until_waiting()
    gone.cancel()
    call = served.stub.Forward()
    await call.write(request(pushed.digest, 1))
    assert not (await read(call)).HasField("error")
    kernel.door.set()


async def test_answers_come_after_the_caller_has_finished_writing(
    serve: Serve, door_group: ExpertGroup, kernel: DoorKernel, pushed: Manifest
) -> None:
    served = await serve(door_group)
    call = served.stub.Forward()
    await call.write(request(pushed.digest, 1, tokens=11))
    await kernel.until_waiting()
    await call.done_writing()
    kernel.door.set()
    assert (await read(call)).correlation_id == 1
    assert await asyncio.wait_for(call.read(), TIMEOUT_S) is grpc.aio.EOF


@pytest.mark.parametrize("inline_multiply_adds", [0, 10**9])
async def test_a_caller_that_reads_nothing_is_not_read_for_ever(
    inline_multiply_adds: int, serve: Serve, group: ExpertGroup, pushed: Manifest
) -> None:
    """Answers that are not read must not pile up in the server."""
    group.load(pushed.digest)
    served = await serve(group, max_queue=2, inline_multiply_adds=inline_multiply_adds)
    call = served.stub.Forward()
    written = 0

    async def flood() -> None:
        nonlocal written
        while True:
            await call.write(request(pushed.digest, written, tokens=2000))
            written += 1
            assert served.service.exchanges_in_flight <= 2

    flooding = asyncio.create_task(flood())
    before = -1
    async with asyncio.timeout(TIMEOUT_S):
        while written != before:
            before = written
            await asyncio.sleep(0.5)
    flooding.cancel()
    other = served.stub.Forward()
    await other.write(request(pushed.digest, 1))
    assert (await read(other)).correlation_id == 1
    call.cancel()


async def test_loading_while_forwarding(
    serve: Serve, group: ExpertGroup, registry: Registry, make_bundle: MakeBundle
) -> None:
    """A steady stream of exchanges, and bundles that come and go beside it: none fails, none changes."""
    steady = registry.push(make_bundle("steady"))
    others = [registry.push(make_bundle(f"b{n}", seed=n, version=f"2.0.{n}")) for n in range(6)]
    group.load(steady.digest)
    expected = group.forward(steady.digest, 1, *inputs(4))
    served = await serve(group)
    call = served.stub.Forward()
    done = asyncio.Event()

    async def exchange_steadily() -> int:
        count = 0
        while not done.is_set():
            await call.write(request(steady.digest, count, layer=1))
            response = await read(call)
            assert torch.equal(tensor_from_proto(response.output), expected)
            count += 1
        return count

    exchanging = asyncio.create_task(exchange_steadily())
    for manifest in others:
        loaded = await served.stub.Load(expert_pb2.LoadRequest(bundle_digest=manifest.digest), timeout=TIMEOUT_S)
        assert (loaded.bundle.digest, loaded.bundle.version) == (manifest.digest, manifest.version)
        new = served.stub.Forward()
        await new.write(request(manifest.digest, 1, layer=1))
        output = tensor_from_proto((await read(new)).output)
        weights = Bundle.open(Path(registry.root).parent / f"b{manifest.version[-1]}").load_layer(1)
        assert torch.equal(output, ReferenceExperts(weights).forward(*inputs(4)))
        new.cancel()
        await served.stub.Unload(expert_pb2.UnloadRequest(bundle_digest=manifest.digest), timeout=TIMEOUT_S)
    done.set()
    assert await exchanging > 6


async def test_load_unload_and_status(serve: Serve, group: ExpertGroup, pushed: Manifest) -> None:
    served = await serve(group)
    for _ in range(2):
        response = await served.stub.Load(expert_pb2.LoadRequest(bundle_digest=pushed.digest))
        assert response.bundle.resident_bytes == 4 * pushed.num_expert_parameters
    status = await served.stub.Status(expert_pb2.ExpertGroupStatusRequest())
    assert status.organ == "breast"
    assert [(bundle.digest, bundle.name, bundle.version, bundle.kernel) for bundle in status.bundles] == [
        (pushed.digest, "breast experts", "1.0.0", "reference")
    ]
    for _ in range(2):
        await served.stub.Unload(expert_pb2.UnloadRequest(bundle_digest=pushed.digest))
    assert not (await served.stub.Status(expert_pb2.ExpertGroupStatusRequest())).bundles


async def test_loads_that_fail_name_the_reason(
    serve: Serve, registry: Registry, pushed: Manifest, make_bundle: MakeBundle
) -> None:
    liver = registry.push(make_bundle("liver", organ="liver"))
    group = ExpertGroup("breast", registry, ReferenceKernel(), device="cpu", max_resident_bytes=100)
    served = await serve(group)
    for digest, code, reason in (
        ("0" * 64, grpc.StatusCode.NOT_FOUND, "no bundle with the digest"),
        (liver.digest, grpc.StatusCode.FAILED_PRECONDITION, "is of organ 'liver'"),
        (pushed.digest, grpc.StatusCode.RESOURCE_EXHAUSTED, "max_resident_bytes = 100"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await served.stub.Load(expert_pb2.LoadRequest(bundle_digest=digest))
        assert failure.value.code() == code
        assert reason in str(failure.value.details())
