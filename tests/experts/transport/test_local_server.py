"""Expert calls on the Unix socket, by a caller that shares memory."""

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from google.rpc import code_pb2, status_pb2

from echovlm_ray.serving.grpc.errors import to_status
from experts.bundles.manifest import Manifest
from experts.group import ExpertGroup
from experts.kernels.base import ExpertWeights
from experts.kernels.reference import ReferenceExperts, ReferenceKernel
from experts.private_folder import private_folder
from experts.registry.registry import Registry
from experts.service import ExpertGroupService
from experts.transport import local_server
from experts.transport.codec import tensor_to_proto
from experts.transport.layout import Area, Layout
from experts.transport.local_connection import (
    MAX_PACKET_BYTES,
    MAX_UNANSWERED,
    LocalConnection,
    LocalConnectionError,
)
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
    """One connection to the socket, with memory."""

    def __init__(self, service: ExpertGroupService, *, attach: bool = True, secret: SystemSecret = NO_SECRET) -> None:
        self.memory = SharedMemory(MemoryBudget(4 * 1024 * 1024))
        self.connection = LocalConnection.connect(service._local_server.socket_path, PATIENCE_S)
        if attach:
            response = self.attach(secret=secret.text)
            assert response.attached == service._instance, response.error.message

    def attach(
        self, *, secret: str = "", size: int | None = None, descriptor: int | None = None
    ) -> expert_pb2.ForwardResponse:
        offer = expert_pb2.SharedMemory(size=self.memory.size if size is None else size, secret=secret)
        request = expert_pb2.ForwardRequest(correlation_id=1, attach=offer)
        self.connection.send(request.SerializeToString(), self.memory.descriptor if descriptor is None else descriptor)
        return self.read()

    def send(self, request: expert_pb2.ForwardRequest) -> None:
        self.connection.send(request.SerializeToString())

    def ask(self, request: expert_pb2.ForwardRequest) -> expert_pb2.ForwardResponse:
        self.send(request)
        return self.read()

    def read(self) -> expert_pb2.ForwardResponse:
        return expert_pb2.ForwardResponse.FromString(self.connection.receive())

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
        self.connection.close()


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


def test_a_bad_call_is_answered_and_the_stream_goes_on(caller: Caller, group: ExpertGroup, pushed: Manifest) -> None:
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
        ({"shared": changed(good, offset=good.offset + 1)}, code_pb2.INVALID_ARGUMENT, "multiple of 64"),
        ({"shared": changed(good, offset=2**63)}, code_pb2.INVALID_ARGUMENT, "end within"),
        ({"shared": changed(good, tokens=2**32 - 1)}, code_pb2.INVALID_ARGUMENT, "end within"),
        ({"shared": changed(good, hidden_size=17)}, code_pb2.INVALID_ARGUMENT, "must be [tokens, 16]"),
        ({"shared": changed(good, dtype=2)}, code_pb2.INVALID_ARGUMENT, "hidden_states is torch.bfloat16"),
        ({"shared": None, "attach": expert_pb2.SharedMemory(size=4096)}, code_pb2.INVALID_ARGUMENT, "others are sent"),
        ({"shared": None, "hidden_states": tensor_to_proto(inputs(4)[0])}, code_pb2.INVALID_ARGUMENT, "over gRPC"),
        ({"bundle_digest": "0" * 10_000}, code_pb2.FAILED_PRECONDITION, "not loaded"),
    ]
    for number, (changes, code, reason) in enumerate(cases, start=1):
        fields = {"bundle_digest": pushed.digest, "shared": good, **changes}
        response = caller.ask(expert_pb2.ForwardRequest(correlation_id=number, **fields))
        assert (response.correlation_id, response.error.code) == (number, code), response
        assert reason in response.error.message
        assert layout.output_TD(area).isnan().all(), "something was written for a call that failed"
    response = caller.ask(expert_pb2.ForwardRequest(correlation_id=77, bundle_digest=pushed.digest, shared=good))
    assert torch.equal(layout.output_TD(area), group.forward(pushed.digest, 0, *inputs(4)))


def changed(shared: expert_pb2.SharedTensors, **fields: int) -> expert_pb2.SharedTensors:
    copy = expert_pb2.SharedTensors()
    copy.CopyFrom(shared)
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


def ends(caller: Caller) -> bool:
    with pytest.raises(LocalConnectionError, match=r"closed|reset"):
        caller.read()
    caller.close()
    return True


def test_who_hands_over_no_memory_of_this_user_is_not_served(service: ExpertGroupService, pushed: Manifest) -> None:
    reading, writing = os.pipe()
    offers: list[tuple[dict[str, int], str]] = [
        ({"size": 0}, "size is 0"),
        ({"size": 4096}, "the caller says 4096"),
        ({"descriptor": reading}, "not of memory"),
    ]
    for offer, reason in offers:
        caller = Caller(service, attach=False)
        response = caller.attach(size=offer.get("size"), descriptor=offer.get("descriptor"))
        assert (response.correlation_id, response.error.code) == (1, code_pb2.INVALID_ARGUMENT)
        assert reason in response.error.message
        assert ends(caller)
    for request in (
        expert_pb2.ForwardRequest(correlation_id=5, bundle_digest=pushed.digest),
        expert_pb2.ForwardRequest(correlation_id=5, attach=expert_pb2.SharedMemory(size=4096)),
    ):
        caller = Caller(service, attach=False)
        assert "must have attach, and a descriptor" in caller.ask(request).error.message
        assert ends(caller)
    for descriptor in (reading, writing):
        os.close(descriptor)
    assert service.exchanges_received == 0


def test_descriptors_that_come_are_closed(service: ExpertGroupService) -> None:
    def mine() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = mine()
    reading, writing = os.pipe()
    for packet, descriptors in ((b"\xff\xff", [reading]), (b"", [reading]), (b"x", [reading, writing, reading])):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(service._local_server.socket_path)
            socket.send_fds(stranger, [packet], descriptors)
            stranger.settimeout(PATIENCE_S)
            with suppress(ConnectionResetError):
                while stranger.recv(MAX_PACKET_BYTES):
                    pass
    os.close(reading)
    os.close(writing)
    until(lambda: mine() == before)


@pytest.mark.parametrize("attach", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("packet", [b"\xff\xff", b"\x08", bytes(MAX_PACKET_BYTES + 1)], ids=["no", "short", "long"])
def test_a_packet_that_is_no_request_ends_its_connection_alone(
    service: ExpertGroupService, group: ExpertGroup, pushed: Manifest, attach: bool, packet: bytes
) -> None:
    other = Caller(service)
    caller = Caller(service, attach=attach)
    caller.connection._socket.send(packet)
    with suppress(LocalConnectionError):
        assert "no ForwardRequest" in caller.read().error.message
    assert ends(caller)
    shared, layout, area = other.place(3)
    other.ask(expert_pb2.ForwardRequest(correlation_id=1, bundle_digest=pushed.digest, shared=shared))
    assert torch.equal(layout.output_TD(area), group.forward(pushed.digest, 0, *inputs(3)))
    other.close()
    assert service.exchanges_received == 1


def test_a_caller_that_says_nothing_is_not_kept(service: ExpertGroupService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_server, "_ATTACH_TIMEOUT_S", 0.1)
    assert ends(Caller(service, attach=False))


def test_there_are_not_more_callers_than_the_limit(
    service: ExpertGroupService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_server, "MAX_CALLERS", 2)
    callers = [Caller(service) for _ in range(2)]
    assert ends(Caller(service, attach=False))
    callers.pop().close()
    until(lambda: len(service._local_server._callers) == 1)
    callers.append(Caller(service))
    for caller in callers:
        caller.close()


def test_a_caller_that_reads_nothing_is_cut_off_and_holds_up_no_other(
    service: ExpertGroupService, group: ExpertGroup, pushed: Manifest
) -> None:
    """With as many answers unread as a caller may have it is served; with any number it is not."""
    caller = Caller(service)
    shared, _, _ = caller.place(1)
    request = expert_pb2.ForwardRequest(correlation_id=1, bundle_digest=pushed.digest, layer=99, shared=shared)

    def answered(number: int) -> bool:
        return service.exchanges_received == number and not service.exchanges_in_flight

    for number in range(1, MAX_UNANSWERED + 1):
        caller.send(request)
        until(partial(answered, number))
    assert {caller.read().error.code for _ in range(MAX_UNANSWERED)} == {code_pb2.INVALID_ARGUMENT}

    def flood() -> None:
        while True:
            with suppress(BlockingIOError):
                caller.connection._socket.send(request.SerializeToString(), socket.MSG_DONTWAIT)

    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        flood()
    other = Caller(service)
    shared, layout, area = other.place(3)
    until(lambda: not service.exchanges_in_flight)
    other.ask(expert_pb2.ForwardRequest(correlation_id=1, bundle_digest=pushed.digest, shared=shared))
    assert torch.equal(layout.output_TD(area), group.forward(pushed.digest, 0, *inputs(3)))
    caller.close()
    other.close()


def test_what_breaks_while_a_packet_is_handled_is_logged_without_its_text(
    service: ExpertGroupService, pushed: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: object, request: object) -> None:
        raise RuntimeError("patient 12345")

    caller = Caller(service)
    shared, _, _ = caller.place(1)
    monkeypatch.setattr(type(service._calls), "multiply_adds", broken)
    caller.send(expert_pb2.ForwardRequest(correlation_id=1, bundle_digest=pushed.digest, shared=shared))
    assert ends(caller)
    until(lambda: "RuntimeError" in caplog.text)
    assert "12345" not in caplog.text.replace('raise RuntimeError("patient 12345")', "")


def test_an_answer_that_is_too_long_is_shortened(group: ExpertGroup, pushed: Manifest) -> None:
    service = ExpertGroupService(
        group, to_status=lambda error: status_pb2.Status(code=13, message="ä" * 100_000), max_queue=3
    )
    caller = Caller(service)
    response = caller.ask(expert_pb2.ForwardRequest(correlation_id=7, bundle_digest=pushed.digest))
    assert (response.correlation_id, response.error.code) == (7, code_pb2.INTERNAL)
    assert response.error.message == "ä" * 1000
    caller.close()
    service.close()


def test_a_full_queue_refuses_and_disturbs_nothing(group: ExpertGroup, kernel: WatchedKernel, pushed: Manifest) -> None:
    service = ExpertGroupService(group, to_status=to_status, max_queue=2, workers=1, inline_multiply_adds=0)
    caller = Caller(service)
    large, layout, area = caller.place(11)
    for number in range(2):
        request = expert_pb2.ForwardRequest(correlation_id=number, bundle_digest=pushed.digest, shared=large)
        caller.send(request)
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


def test_a_caller_that_leaves_takes_its_calls_with_it_and_disturbs_no_other(
    group: ExpertGroup, kernel: WatchedKernel, pushed: Manifest
) -> None:
    service = ExpertGroupService(group, to_status=to_status, max_queue=10, workers=1, inline_multiply_adds=0)
    before = len(mapped())
    caller = Caller(service)
    large = caller.place(11)[0]
    for number in range(4):
        request = expert_pb2.ForwardRequest(correlation_id=number, bundle_digest=pushed.digest, shared=large)
        caller.send(request)
    assert kernel.waiting.acquire(timeout=PATIENCE_S)
    until(lambda: service.exchanges_in_flight == 4)
    caller.close()
    until(lambda: service.exchanges_in_flight == 1)
    del caller
    # The one that has begun writes into memory that is not read any more.
    kernel.door.set()
    until(lambda: service.exchanges_in_flight == 0)
    until(lambda: len(mapped()) == before)
    assert not kernel.waiting.acquire(blocking=False), "a call was begun for a caller that had left"
    other = Caller(service)
    shared, layout, area = other.place(3)
    other.ask(expert_pb2.ForwardRequest(correlation_id=1, bundle_digest=pushed.digest, shared=shared))
    assert torch.equal(layout.output_TD(area), group.forward(pushed.digest, 0, *inputs(3)))
    other.close()
    service.close()


def test_small_calls_wait_for_no_large_one(group: ExpertGroup, kernel: WatchedKernel, pushed: Manifest) -> None:
    limit = 3 * HIDDEN * 24 * 2 * 10
    service = ExpertGroupService(group, to_status=to_status, max_queue=10, inline_multiply_adds=limit // 8)
    caller = Caller(service)
    for number, tokens in ((1, 11), (2, 10)):
        shared, _, _ = caller.place(tokens)
        request = expert_pb2.ForwardRequest(correlation_id=number, bundle_digest=pushed.digest, shared=shared)
        caller.send(request)
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
    def test_a_caller_without_the_secret_is_refused(self, guarded: ExpertGroupService, sent: SystemSecret) -> None:
        caller = Caller(guarded, attach=False)
        assert "does not have this system's secret" in caller.attach(secret=sent.text).error.message
        assert ends(caller)

    def test_one_with_it_is_served(self, guarded: ExpertGroupService) -> None:
        Caller(guarded, secret=self.SECRET).close()

    def test_the_socket_lies_where_no_other_user_may_enter_and_goes_with_the_service(self, group: ExpertGroup) -> None:
        service = ExpertGroupService(group, to_status=to_status, max_queue=3)
        path = Path(service._local_server.socket_path)
        assert path.is_socket()
        for folder in (path.parent, path.parent.parent):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert folder.stat().st_uid == os.getuid()
        service.close()
        assert not path.exists()

    def test_a_caller_of_another_user_is_not_served(
        self, guarded: ExpertGroupService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        caller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        caller.connect(guarded._local_server.socket_path)
        caller.settimeout(PATIENCE_S)
        assert caller.recv(1) == b""
        caller.close()

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
    def test_another_user_cannot_even_connect(self, guarded: ExpertGroupService) -> None:
        path = guarded._local_server.socket_path
        code = f"import socket; socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect({path!r})"
        done = subprocess.run(["python3", "-c", code], user=65534, group=65534, capture_output=True, text=True)
        assert "PermissionError" in done.stderr
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0

    def test_what_a_killed_process_left_is_removed_and_what_is_used_is_not(
        self, guarded: ExpertGroupService, group: ExpertGroup
    ) -> None:
        used = Path(guarded._local_server.socket_path)
        left, young = private_folder() / "sockets" / "left-by-a-test", private_folder() / "sockets" / "young-of-a-test"
        for path in (left, young):
            path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
                listening.bind(str(path))
        os.utime(left, (0, 0))
        os.utime(used, (0, 0))
        ExpertGroupService(group, to_status=to_status, max_queue=3).close()
        assert not left.exists()
        assert young.exists()
        assert used.exists()
        young.unlink()
