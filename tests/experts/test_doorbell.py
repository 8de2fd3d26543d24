"""The token loop on the Unix socket, asked by a caller that shares memory."""

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import code_pb2

from echovlm_ray.serving.errors import to_status
from experts.doorbell import FORWARD
from experts.group import ExpertGroup
from experts.kernels.base import ExpertWeights
from experts.kernels.reference import ReferenceExperts, ReferenceKernel
from experts.manifest import Manifest
from experts.private_folder import private_folder
from experts.registry import Registry
from experts.service import ExpertGroupService
from experts.transport import wire
from experts.transport.codec import tensor_to_proto
from experts.transport.grpc_core import DirectCall, StreamEndedError
from experts.transport.layout import Area, Layout
from experts.transport.secret import NO_SECRET, SystemSecret
from experts.transport.shared_memory import MemoryBudget, SharedMemory
from protos import expert_pb2, tensor_pb2
from tests.waiting import until

HIDDEN = 16
PATIENCE_S = 20


class WatchedKernel(ReferenceKernel):
    """The reference kernel; notes where its tokens lie, and waits at a door when there are more than ten."""

    def __init__(self) -> None:
        self.places: list[tuple[int, int]] = []
        self.door, self.waiting = threading.Event(), threading.Semaphore(0)

    def load(self, weights: ExpertWeights) -> ReferenceExperts:
        kernel = self

        class Watched(ReferenceExperts):
            def forward(self, x_TD: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
                kernel.places.append((x_TD.data_ptr(), x_TD.nbytes))
                if x_TD.shape[0] > 10:
                    kernel.waiting.release()
                    assert kernel.door.wait(PATIENCE_S)
                return super().forward(x_TD, *rest)

        return Watched(weights)


class Caller:
    """One stream to the socket, with memory."""

    def __init__(self, service: ExpertGroupService, *, attach: bool = True, secret: SystemSecret = NO_SECRET) -> None:
        self.memory = SharedMemory(MemoryBudget(4 * 1024 * 1024))
        self.channel = grpc.insecure_channel(service._doorbell.address)
        self.call = DirectCall(self.channel, FORWARD, secret.metadata)
        if attach:
            request = expert_pb2.ForwardRequest(correlation_id=1, attach=self.memory.attach_message())
            assert self.ask(request).attached == service._instance
            self.memory.attached()

    def ask(self, request: expert_pb2.ForwardRequest) -> expert_pb2.ForwardResponse:
        self.call.send(request.SerializeToString())
        return self.read()

    def read(self) -> expert_pb2.ForwardResponse:
        impatience = threading.Timer(PATIENCE_S, self.call.cancel, ["no answer"])
        impatience.start()
        try:
            return expert_pb2.ForwardResponse.FromString(self.call.receive())
        finally:
            impatience.cancel()

    def place(self, tokens: int, seed: int = 0) -> tuple[expert_pb2.SharedTensors, Layout, Area]:
        layout = Layout.of(tokens, HIDDEN, 2, torch.float32)
        allocated = self.memory.allocate(layout.nbytes)
        assert allocated is not None
        area, offset = allocated
        x_TD, index_TK, weight_TK = inputs(tokens, seed)
        layout.hidden_states_TD(area).copy_(x_TD)
        layout.expert_index_TK(area).copy_(index_TK)
        layout.weight_TK(area).copy_(weight_TK)
        layout.output_TD(area).fill_(torch.nan)
        return layout.to_proto(offset), layout, area

    def close(self) -> None:
        self.call.cancel("over")
        self.call.drain()
        self.channel.close()


def inputs(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn((tokens, HIDDEN), generator=generator),
        torch.randint(-1, 3, (tokens, 2), generator=generator, dtype=torch.int32),
        torch.rand((tokens, 2), generator=generator),
    )


@pytest.fixture
def kernel() -> WatchedKernel:
    return WatchedKernel()


@pytest.fixture
def group(kernel: WatchedKernel, registry: Registry, pushed: Manifest) -> ExpertGroup:
    group = ExpertGroup("breast", registry, kernel, device="cpu", max_resident_bytes=10**8)
    group.load(pushed.digest)
    return group


@pytest.fixture(params=[0, 10**9], ids=["threads", "at once"])
def service(request: pytest.FixtureRequest, group: ExpertGroup) -> Iterator[ExpertGroupService]:
    service = ExpertGroupService(group, to_status=to_status, max_queue=3, inline_multiply_adds=request.param)
    yield service
    service.close()


@pytest.fixture
def caller(service: ExpertGroupService, kernel: WatchedKernel) -> Iterator[Caller]:
    caller = Caller(service)
    yield caller
    kernel.door.set()
    caller.close()


def mapped(name: str = "memfd:echovlm") -> list[tuple[int, int]]:
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if name in line]
    return [tuple(int(part, 16) for part in line[0].split("-")) for line in lines]  # type: ignore[misc]


def test_answers_are_those_of_the_group_and_lie_where_they_were_wanted(
    caller: Caller, group: ExpertGroup, kernel: WatchedKernel, pushed: Manifest
) -> None:
    kernel.door.set()
    for tokens, layer in ((1, 0), (7, 1), (300, 0)):
        expected_TD = group.forward(pushed.digest, layer, *inputs(tokens, tokens))
        shared, layout, area = caller.place(tokens, tokens)
        request = expert_pb2.ForwardRequest(
            correlation_id=2**64 - tokens, bundle_digest=pushed.digest, layer=layer, shared=shared
        )
        response = caller.ask(request)
        assert not response.HasField("error"), response.error.message
        assert response.correlation_id == 2**64 - tokens
        assert response.output_in_place
        assert response.compute_ns > 0
        assert not response.HasField("output")
        assert torch.equal(layout.output_TD(area), expected_TD)


def test_the_kernel_reads_the_callers_memory_itself(
    caller: Caller, kernel: WatchedKernel, group: ExpertGroup, pushed: Manifest
) -> None:
    """A copy on the way to the kernel would be in other memory."""
    shared, _, _ = caller.place(5)
    kernel.places.clear()
    caller.ask(expert_pb2.ForwardRequest(correlation_id=1, bundle_digest=pushed.digest, shared=shared))
    ((start, nbytes),) = kernel.places
    assert any(low <= start and start + nbytes <= high for low, high in mapped())


def test_tensors_may_still_travel_in_the_message(caller: Caller, group: ExpertGroup, pushed: Manifest) -> None:
    x_TD, index_TK, weight_TK = inputs(9)
    head = expert_pb2.ForwardRequest(
        correlation_id=4,
        bundle_digest=pushed.digest,
        expert_index=tensor_to_proto(index_TK),
        weight=tensor_to_proto(weight_TK),
    )
    caller.call.send(wire.with_tensor(head, x_TD))
    response, data = wire.parse(expert_pb2.ForwardResponse, caller.call.receive())
    expected_TD = group.forward(pushed.digest, 0, x_TD, index_TK, weight_TK)
    assert torch.equal(wire.tensor_of(response.output, data, "output"), expected_TD)


def test_a_bad_exchange_is_answered_and_the_stream_goes_on(
    caller: Caller, group: ExpertGroup, pushed: Manifest
) -> None:
    good, layout, area = caller.place(4)
    wrong_expert, wrong_layout, wrong_area = caller.place(4)
    wrong_layout.expert_index_TK(wrong_area).fill_(3)
    untokened = expert_pb2.SharedTensors(dtype=tensor_pb2.DATA_TYPE_FLOAT32)
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"bundle_digest": "0" * 64}, code_pb2.FAILED_PRECONDITION, "not loaded"),
        ({"layer": 99}, code_pb2.INVALID_ARGUMENT, "layers 0 to 1"),
        ({"shared": wrong_expert}, code_pb2.INVALID_ARGUMENT, "experts 0 to 2"),
        (
            {"shared": untokened},
            code_pb2.INVALID_ARGUMENT,
            "at least 1",
        ),
        ({"shared": changed(good, offset=0)}, code_pb2.INVALID_ARGUMENT, "at least 64"),
        ({"shared": changed(good, offset=2**63)}, code_pb2.INVALID_ARGUMENT, "end within"),
        ({"shared": changed(good, tokens=2**32 - 1)}, code_pb2.INVALID_ARGUMENT, "end within"),
        ({"shared": changed(good, hidden_size=17)}, code_pb2.INVALID_ARGUMENT, "must be [tokens, 16]"),
        ({"shared": changed(good, dtype=2)}, code_pb2.INVALID_ARGUMENT, "hidden_states is torch.bfloat16"),
        ({"attach": expert_pb2.SharedMemory(size=4096)}, code_pb2.INVALID_ARGUMENT, "has shared memory already"),
    ]
    for number, (changes, code, reason) in enumerate(cases[:-1], start=1):
        fields = {"bundle_digest": pushed.digest, "shared": good, **changes}
        response = caller.ask(expert_pb2.ForwardRequest(correlation_id=number, **fields))
        assert (response.correlation_id, response.error.code) == (number, code), response
        assert reason in response.error.message
        assert layout.output_TD(area).isnan().all(), "something was written for an exchange that failed"
    response = caller.ask(expert_pb2.ForwardRequest(correlation_id=77, bundle_digest=pushed.digest, shared=good))
    assert torch.equal(layout.output_TD(area), group.forward(pushed.digest, 0, *inputs(4)))
    changes, code, reason = cases[-1]
    response = caller.ask(expert_pb2.ForwardRequest(correlation_id=78, **changes))
    assert response.error.code == code
    assert reason in response.error.message


def changed(shared: expert_pb2.SharedTensors, **fields: int) -> expert_pb2.SharedTensors:
    copy = expert_pb2.SharedTensors()
    copy.CopyFrom(shared)
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


def test_who_shows_no_memory_of_this_user_is_not_served(service: ExpertGroupService, pushed: Manifest) -> None:
    memory = SharedMemory(MemoryBudget(4096))
    offer = memory.attach_message()
    offer.token = b"0" * 16
    for request, reason in (
        (expert_pb2.ForwardRequest(correlation_id=5, bundle_digest=pushed.digest), "must have attach"),
        (expert_pb2.ForwardRequest(correlation_id=5, attach=expert_pb2.SharedMemory()), "size is 0"),
        (expert_pb2.ForwardRequest(correlation_id=5, attach=offer), "another process"),
    ):
        caller = Caller(service, attach=False)
        response = caller.ask(request)
        assert response.error.code == code_pb2.INVALID_ARGUMENT
        assert reason in response.error.message
        with pytest.raises(StreamEndedError, match="FAILED_PRECONDITION"):
            caller.read()
        caller.close()
    caller = Caller(service, attach=False)
    caller.call.send(b"\xff\xff")
    with pytest.raises(StreamEndedError, match="INVALID_ARGUMENT"):
        caller.read()
    caller.close()
    assert service.exchanges_received == 0


@pytest.mark.parametrize("message", [bytes(5_000_000), b"\x08\x01" * 2_500_000], ids=["zeros", "fields"])
def test_a_large_first_message_ends_its_stream_unread(service: ExpertGroupService, message: bytes) -> None:
    caller = Caller(service, attach=False)
    caller.call.send(message)
    with pytest.raises(StreamEndedError, match="INVALID_ARGUMENT: the first message of a stream must have attach"):
        caller.read()
    assert service.exchanges_received == 0
    Caller(service)


def test_a_full_queue_refuses_and_disturbs_nothing(group: ExpertGroup, kernel: WatchedKernel, pushed: Manifest) -> None:
    service = ExpertGroupService(group, to_status=to_status, max_queue=2, workers=1, inline_multiply_adds=0)
    caller = Caller(service)
    large, layout, area = caller.place(11)
    for number in range(2):
        request = expert_pb2.ForwardRequest(correlation_id=number, bundle_digest=pushed.digest, shared=large)
        caller.call.send(request.SerializeToString())
    until(lambda: service.exchanges_in_flight == 2)
    small, _, _ = caller.place(1)
    response = caller.ask(expert_pb2.ForwardRequest(correlation_id=9, bundle_digest=pushed.digest, shared=small))
    assert (response.correlation_id, response.error.code) == (9, code_pb2.RESOURCE_EXHAUSTED)
    kernel.door.set()
    assert {caller.read().correlation_id for _ in range(2)} == {0, 1}
    assert torch.equal(layout.output_TD(area), group.forward(pushed.digest, 0, *inputs(11)))
    assert service.exchanges_in_flight == 0
    caller.close()
    service.close()


def test_a_caller_that_leaves_takes_its_exchanges_with_it_and_harms_nobody(
    group: ExpertGroup, kernel: WatchedKernel, pushed: Manifest
) -> None:
    service = ExpertGroupService(group, to_status=to_status, max_queue=10, workers=1, inline_multiply_adds=0)
    before = len(mapped())
    caller = Caller(service)
    large = caller.place(11)[0]
    for number in range(4):
        request = expert_pb2.ForwardRequest(correlation_id=number, bundle_digest=pushed.digest, shared=large)
        caller.call.send(request.SerializeToString())
    assert kernel.waiting.acquire(timeout=PATIENCE_S)
    until(lambda: service.exchanges_in_flight == 4)
    caller.close()
    until(lambda: service.exchanges_in_flight == 1)
    del caller
    # The one that has begun writes into memory that is not read any more.
    kernel.door.set()
    until(lambda: service.exchanges_in_flight == 0)
    until(lambda: len(mapped()) == before)
    assert not kernel.waiting.acquire(blocking=False), "an exchange was begun for a caller that had left"
    other = Caller(service)
    shared, layout, area = other.place(3)
    other.ask(expert_pb2.ForwardRequest(correlation_id=1, bundle_digest=pushed.digest, shared=shared))
    assert torch.equal(layout.output_TD(area), group.forward(pushed.digest, 0, *inputs(3)))
    other.close()
    service.close()


def test_small_exchanges_wait_for_no_large_one(group: ExpertGroup, kernel: WatchedKernel, pushed: Manifest) -> None:
    limit = 3 * HIDDEN * 24 * 2 * 10
    service = ExpertGroupService(group, to_status=to_status, max_queue=10, inline_multiply_adds=limit // 8)
    caller = Caller(service)
    for number, tokens in ((1, 11), (2, 10)):
        shared, _, _ = caller.place(tokens)
        request = expert_pb2.ForwardRequest(correlation_id=number, bundle_digest=pushed.digest, shared=shared)
        caller.call.send(request.SerializeToString())
        if number == 1:
            assert kernel.waiting.acquire(timeout=PATIENCE_S)
    assert caller.read().correlation_id == 2
    kernel.door.set()
    assert caller.read().correlation_id == 1
    caller.close()
    service.close()


class TestStrangers:
    SECRET = SystemSecret.random()

    @pytest.fixture
    def guarded(self, group: ExpertGroup) -> Iterator[ExpertGroupService]:
        service = ExpertGroupService(group, to_status=to_status, max_queue=3, secret=self.SECRET)
        yield service
        service.close()

    @pytest.mark.parametrize("sent", [NO_SECRET, SystemSecret.random()])
    def test_a_stream_without_the_secret_is_refused_before_it_is_read(
        self, guarded: ExpertGroupService, sent: SystemSecret
    ) -> None:
        with pytest.raises(StreamEndedError, match="UNAUTHENTICATED"):
            Caller(guarded, secret=sent)

    def test_one_with_it_is_served(self, guarded: ExpertGroupService) -> None:
        Caller(guarded, secret=self.SECRET).close()

    def test_the_socket_lies_where_no_other_user_may_enter_and_goes_with_the_service(self, group: ExpertGroup) -> None:
        service = ExpertGroupService(group, to_status=to_status, max_queue=3)
        path = Path(service._doorbell.address.removeprefix("unix:"))
        assert path.is_socket()
        for folder in (path.parent, path.parent.parent):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert folder.stat().st_uid == os.getuid()
        service.close()
        assert not path.exists()

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
    def test_another_user_cannot_even_connect(self, guarded: ExpertGroupService) -> None:
        path = guarded._doorbell.address.removeprefix("unix:")
        code = f"import socket; socket.socket(socket.AF_UNIX).connect({path!r})"
        done = subprocess.run(["python3", "-c", code], user=65534, group=65534, capture_output=True, text=True)
        assert "PermissionError" in done.stderr
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0

    def test_what_a_killed_process_left_is_removed_and_what_is_used_is_not(
        self, guarded: ExpertGroupService, group: ExpertGroup
    ) -> None:
        used = Path(guarded._doorbell.address.removeprefix("unix:"))
        left, young = private_folder() / "sockets" / "left-by-a-test", private_folder() / "sockets" / "young-of-a-test"
        for path in (left, young):
            path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(str(path))
        os.utime(left, (0, 0))
        os.utime(used, (0, 0))
        ExpertGroupService(group, to_status=to_status, max_queue=3).close()
        assert not left.exists()
        assert young.exists()
        assert used.exists()
        young.unlink()
