"""The local path to a replica, broken on purpose in each of its steps: gRPC carries the calls, with one warning."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.group import ExpertGroup
from experts.kernels.base import NO_EXPERT
from experts.private_folder import private_folder
from experts.service import ExpertGroupService
from experts.transport import attached_memory, host, local_connection
from experts.transport.attached_memory import AttachError
from experts.transport.local_connection import MAX_PACKET_BYTES, LocalConnection, LocalConnectionError
from experts.transport.secret import SystemSecret
from protos import expert_pb2
from router import channel, local_path
from router.channel import ChannelState
from router.errors import ExpertsUnavailableError
from router.local import LocalExperts
from router.pending_call import ReplicaLostError
from router.remote import RemoteExperts
from tests.expert_servers import ServerThread, expert_group, server_thread
from tests.split_golden import SplitGolden, split_golden

ORGAN = "liver"
PATIENCE_S = 20

# Serves one connection, of which it is given the number, from 0.
Script = Callable[[LocalConnection, int], None]


@pytest.fixture(scope="module")
def split(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SplitGolden:
    groups = {ORGAN: (0, 1), "heart": (2, 3)}
    return split_golden(golden_dir / "base" / "checkpoint", tmp_path_factory.mktemp("split"), groups, "organs")


@pytest.fixture(scope="module")
def group(split: SplitGolden) -> ExpertGroup:
    return expert_group(ORGAN, split.registry, [split.expert_set.bundle_digest(ORGAN)])


@pytest.fixture(scope="module")
def threads() -> Iterator[ServerThread]:
    with server_thread() as running:
        yield running


class Replica:
    """A replica, and a router's way to it."""

    def __init__(self, split: SplitGolden, group: ExpertGroup, threads: ServerThread) -> None:
        self.digest = split.expert_set.bundle_digest(ORGAN)
        self.local = LocalExperts({ORGAN: group})
        self.threads = threads
        self.address = threads.serve(group)
        self.hidden_size = int(str(split.config["hidden_size"]))
        self.dtype = split.tensors["lm_head.weight"].dtype

    @property
    def service(self) -> ExpertGroupService:
        return self.threads.services[self.address]

    @property
    def server(self) -> Any:
        return self.service._local_server

    @contextmanager
    def router(self, timeout_s: float = 10.0) -> Iterator[RemoteExperts]:
        """The router's placement, connected."""
        experts = RemoteExperts(lambda organ: [self.address], exchange_timeout_s=timeout_s)
        try:
            experts.wait_until_connected([ORGAN], PATIENCE_S)
            yield experts
        finally:
            experts.close()

    def inputs(self, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return (
            torch.randn((5, self.hidden_size), generator=generator).to(self.dtype),
            torch.randint(NO_EXPERT, 2, (5, 2), generator=generator),
            torch.rand((5, 2), generator=generator).to(self.dtype),
        )

    def compute(self, experts: RemoteExperts, times: int = 3) -> None:
        """Several calls at once, all answered with the right bits."""
        arguments = [self.inputs(seed) for seed in range(times)]
        calls = [experts.send(ORGAN, self.digest, 1, *each) for each in arguments]
        for call, each in zip(calls, arguments, strict=True):
            assert torch.equal(call.result(), self.local.send(ORGAN, self.digest, 1, *each).result())


@pytest.fixture
def replica(split: SplitGolden, group: ExpertGroup, threads: ServerThread) -> Iterator[Replica]:
    replica = Replica(split, group, threads)
    yield replica
    threads.stop(replica.address)
    threads.forget(replica.address)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextmanager
def scripted(replica: Replica, script: Script) -> Iterator[None]:
    """Another process's socket, as it were, in place of the replica's: serves connections as the script says."""
    path = private_folder() / "sockets" / f"test-{os.getpid()}"
    listening = local_connection.listen_on(str(path))
    connections: list[LocalConnection] = []

    def serve(connection: LocalConnection, number: int) -> None:
        with suppress(LocalConnectionError):
            script(connection, number)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connections.append(LocalConnection(listening.accept()[0]))
                arguments = (connections[-1], len(connections) - 1)
                threading.Thread(target=serve, args=arguments, daemon=True).start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    original, replica.server.socket_path = replica.server.socket_path, str(path)
    yield
    replica.server.socket_path = original
    listening.shutdown(socket.SHUT_RDWR)
    accepting.join()
    for connection in connections:
        connection.close()
    listening.close()
    path.unlink()


def attach(connection: LocalConnection, instance: str) -> None:
    """What a replica does first."""
    packet, descriptor = connection.receive_with_descriptor()
    assert descriptor is not None
    os.close(descriptor)
    request = expert_pb2.ForwardRequest.FromString(packet)
    response = expert_pb2.ForwardResponse(correlation_id=request.correlation_id, attached=instance)
    connection.send(response.SerializeToString())
    connection.set_timeout(None)


def read(connection: LocalConnection) -> expert_pb2.ForwardRequest:
    return expert_pb2.ForwardRequest.FromString(connection.receive())


class TestAtTheOpening:
    def falls_back(self, replica: Replica, warnings: Callable[[], list[str]], reason: str) -> None:
        with replica.router() as experts:
            (channel,) = experts._refresh(ORGAN)
            assert not channel.shares_memory
            replica.compute(experts)
            (warning,) = warnings()
            assert "tensors travel in the messages: " in warning
            assert reason in warning
            assert experts.unavailable(ORGAN) is None

    def test_without_trouble_there_is_no_warning(self, replica: Replica, warnings: Callable[[], list[str]]) -> None:
        with replica.router() as experts:
            (channel,) = experts._refresh(ORGAN)
            assert channel.shares_memory
            replica.compute(experts)
        assert not warnings()

    def test_the_socket_is_not_there(self, replica: Replica, warnings: Callable[[], list[str]]) -> None:
        Path(replica.server.socket_path).unlink()
        self.falls_back(replica, warnings, "its local socket is not there")

    def test_the_replica_is_on_another_host(
        self, replica: Replica, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Then it is nothing to warn of."""
        caplog.set_level(logging.INFO)
        Path(replica.server.socket_path).unlink()
        monkeypatch.setattr(channel, "is_this_machine", lambda address: False)
        with replica.router() as experts:
            replica.compute(experts)
        (record,) = [record for record in caplog.records if "travel in the messages" in record.getMessage()]
        assert record.levelno == logging.INFO
        assert "on another host" in record.getMessage()

    @pytest.mark.parametrize(
        ("kind", "reason"), [(socket.SOCK_SEQPACKET, "Connection refused"), (socket.SOCK_STREAM, "wrong type")]
    )
    def test_what_is_there_does_not_listen(
        self, replica: Replica, warnings: Callable[[], list[str]], kind: int, reason: str
    ) -> None:
        Path(replica.server.socket_path).unlink()
        with socket.socket(socket.AF_UNIX, kind) as other:
            other.bind(replica.server.socket_path)
            if kind == socket.SOCK_STREAM:
                other.listen()
            self.falls_back(replica, warnings, reason)

    def test_too_many_wait_to_be_accepted(self, replica: Replica, warnings: Callable[[], list[str]]) -> None:
        path = replica.server.socket_path
        Path(path).unlink()
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first,
        ):
            other.bind(path)
            other.listen(0)
            first.connect(path)
            self.falls_back(replica, warnings, "cannot be connected to")

    def test_the_folder_belongs_to_another_user(
        self, replica: Replica, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(self: socket.socket, path: str) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(socket.socket, "connect", refused)
        self.falls_back(replica, warnings, "Permission denied")

    def test_the_listening_process_is_of_another_user(
        self, replica: Replica, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
        self.falls_back(replica, warnings, f"the other process is of user {user}, and this one of user {user + 1}")

    def test_the_system_gives_no_memory(
        self, replica: Replica, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(name: str, flags: int) -> int:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(os, "memfd_create", refused)
        self.falls_back(replica, warnings, "no memory can be had (Too many open files)")

    def test_the_memory_cannot_be_handed_over(
        self, replica: Replica, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def changed(connected: socket.socket) -> None:
            raise AssertionError

        monkeypatch.setattr(socket, "send_fds", changed)
        self.falls_back(replica, warnings, "the local path cannot be opened: TypeError")

    def test_the_replica_cannot_map_the_memory(
        self, replica: Replica, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(descriptor: int, size: int) -> None:
            raise AttachError("the memory cannot be mapped: Cannot allocate memory")

        monkeypatch.setattr(attached_memory, "_check", refused)
        self.falls_back(replica, warnings, "Cannot allocate memory")

    def test_the_replica_breaks_at_the_memory(
        self, replica: Replica, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(descriptor: int, size: int) -> None:
            raise RuntimeError

        monkeypatch.setattr(attached_memory, "_check", broken)
        with replica.router() as experts:
            replica.compute(experts)
        said = [record for record in caplog.records if "travel in the messages" in record.getMessage()]
        assert [record.levelno for record in said] == [logging.WARNING]

    def test_the_replica_is_of_another_system(self, replica: Replica, warnings: Callable[[], list[str]]) -> None:
        replica.server._secret = SystemSecret.random()
        self.falls_back(replica, warnings, "does not have this system's secret")

    def test_another_process_answers(self, replica: Replica, warnings: Callable[[], list[str]]) -> None:
        replica.server._instance = "another's"
        self.falls_back(replica, warnings, "another process answers")

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (b"\xff\xff", "no ForwardResponse"),
            (b"", "closed the connection"),
            (b"\x08\x01", "another process answers"),
            (bytes(MAX_PACKET_BYTES + 1), "more than"),
            (None, "closed the connection"),
        ],
        ids=["garbled", "empty", "short", "long", "none"],
    )
    def test_the_answer_is_no_answer(
        self, replica: Replica, warnings: Callable[[], list[str]], answer: bytes | None, reason: str
    ) -> None:
        def script(connection: LocalConnection, number: int) -> None:
            _, descriptor = connection.receive_with_descriptor()
            assert descriptor is not None
            os.close(descriptor)
            if answer is None:
                connection.close()
            else:
                connection._socket.send(answer)

        with scripted(replica, script):
            self.falls_back(replica, warnings, reason)

    def test_there_is_no_answer(
        self, replica: Replica, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(local_path, "OPEN_TIMEOUT_S", 0.2)
        with scripted(replica, lambda connection, number: None):
            self.falls_back(replica, warnings, "does not answer")

    def test_the_replica_could_not_listen(
        self, replica: Replica, warnings: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
    ) -> None:
        """It has warned itself."""
        path, replica.server.socket_path = replica.server.socket_path, ""
        with replica.router() as experts:
            replica.compute(experts)
        replica.server.socket_path = path
        assert "the replica offers no shared memory" in caplog.text
        assert not warnings()


class TestLater:
    """The local path stands, and a call over it does not come back."""

    def goes_on(
        self,
        replica: Replica,
        warnings: Callable[[], list[str]],
        breaks: Callable[[LocalConnection], None],
        reason: str,
        calls: int = 3,
    ) -> None:
        seen = threading.Event()

        def script(connection: LocalConnection, number: int) -> None:
            attach(connection, replica.service._instance)
            assert seen.wait(PATIENCE_S)
            breaks(connection)

        with scripted(replica, script), replica.router() as experts:
            (channel,) = experts._refresh(ORGAN)
            assert channel.shares_memory
            seen.set()
            replica.compute(experts, calls)
            assert not channel.shares_memory
            assert channel.state is ChannelState.READY
            assert experts.unavailable(ORGAN) is None
            replica.compute(experts)
            until(warnings)
            (warning,) = warnings()
            assert "tensors travel in the messages: " in warning
            assert reason in warning
            assert channel.in_flight == 0
            assert experts._refresh(ORGAN) == [channel], "the replica was connected anew"

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (b"\xff\xff", "no ForwardResponse"),
            (b"", "closed the connection"),
            (expert_pb2.ForwardResponse(correlation_id=1).SerializeToString(), "neither an output nor an error"),
            (expert_pb2.ForwardResponse(correlation_id=99, output_in_place=True).SerializeToString(), "to no call"),
            (bytes(MAX_PACKET_BYTES + 1), "more than"),
        ],
        ids=["garbled", "empty", "short", "another's", "long"],
    )
    def test_the_answer_is_no_answer(
        self, replica: Replica, warnings: Callable[[], list[str]], answer: bytes, reason: str
    ) -> None:
        def breaks(connection: LocalConnection) -> None:
            read(connection)
            connection._socket.send(answer)

        self.goes_on(replica, warnings, breaks, reason)

    @pytest.mark.parametrize("received", [0, 1, 3])
    def test_the_replica_closes_in_the_middle(
        self, replica: Replica, warnings: Callable[[], list[str]], received: int
    ) -> None:
        def breaks(connection: LocalConnection) -> None:
            for _ in range(received):
                read(connection)
            connection.close()

        self.goes_on(replica, warnings, breaks, "")

    def test_the_socket_is_full(
        self, replica: Replica, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(local_connection, "_BUFFER_BYTES", 0)
        self.goes_on(replica, warnings, lambda connection: None, "does not read", calls=30)

    def test_the_replica_does_not_read_what_a_caller_may_send(
        self, replica: Replica, warnings: Callable[[], list[str]]
    ) -> None:
        """As many calls as may be unanswered fit into the socket; then the caller waits for answers."""

        def breaks(connection: LocalConnection) -> None:
            time.sleep(0.3)
            connection.close()

        self.goes_on(replica, warnings, breaks, "", calls=local_connection.MAX_UNANSWERED + 5)

    def test_the_local_server_ends_while_it_computes(self, replica: Replica, warnings: Callable[[], list[str]]) -> None:
        with replica.router() as experts:
            (channel,) = experts._refresh(ORGAN)
            assert channel.shares_memory
            arguments = replica.inputs(1)
            calls = [experts.send(ORGAN, replica.digest, 0, *arguments) for _ in range(20)]
            replica.server.stop()
            wanted_TD = replica.local.send(ORGAN, replica.digest, 0, *arguments).result()
            assert all(torch.equal(call.result(), wanted_TD) for call in calls)
            until(warnings)
            assert not channel.shares_memory
            replica.compute(experts)
        assert len(warnings()) == 1

    def test_it_is_noticed_while_there_are_no_calls(self, replica: Replica, warnings: Callable[[], list[str]]) -> None:
        with replica.router() as experts:
            (channel,) = experts._refresh(ORGAN)
            replica.server.stop()
            until(lambda: not channel.shares_memory)
            until(warnings)
            replica.compute(experts)
            assert channel.state is ChannelState.READY
        (warning,) = warnings()
        assert "closed the connection" in warning

    def test_a_local_server_that_hangs_is_not_used_again(
        self, replica: Replica, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A call that is not answered costs its timeout; after it the organ is there again, over gRPC."""
        monkeypatch.setattr(local_path, "OPEN_TIMEOUT_S", 0.2)

        def script(connection: LocalConnection, number: int) -> None:
            if number == 0:
                attach(connection, replica.service._instance)

        with scripted(replica, script), replica.router(timeout_s=0.5) as experts:
            call = experts.send(ORGAN, replica.digest, 0, *replica.inputs(0))
            with pytest.raises(ReplicaLostError, match="did not answer within"):
                call._pending.response()
            experts.wait_until_connected([ORGAN], PATIENCE_S)
            replica.compute(experts)
            (warning,) = warnings()
            assert "does not answer" in warning

    def test_a_retired_replica_still_answers_what_is_under_way(
        self, replica: Replica, warnings: Callable[[], list[str]]
    ) -> None:
        going = threading.Event()

        def script(connection: LocalConnection, number: int) -> None:
            attach(connection, replica.service._instance)
            assert going.wait(PATIENCE_S)
            connection.close()

        with scripted(replica, script), replica.router() as experts:
            (retired,) = experts._refresh(ORGAN)
            arguments = replica.inputs(1)
            calls = [experts.send(ORGAN, replica.digest, 0, *arguments) for _ in range(3)]
            retired.retire()
            going.set()
            wanted_TD = replica.local.send(ORGAN, replica.digest, 0, *arguments).result()
            assert all(torch.equal(call.result(), wanted_TD) for call in calls)
            assert retired.state is ChannelState.CLOSED
            assert retired.in_flight == 0


def test_what_is_too_long_for_a_packet_goes_over_grpc(replica: Replica, warnings: Callable[[], list[str]]) -> None:
    with replica.router() as experts:
        (channel,) = experts._refresh(ORGAN)
        with pytest.raises(ExpertsUnavailableError, match="is not loaded"):
            experts.send(ORGAN, "0" * MAX_PACKET_BYTES, 0, *replica.inputs(1)).result()
        assert channel.shares_memory
        replica.compute(experts)
    assert not warnings()


def test_what_opening_a_channel_raises_does_not_leave_it_connecting(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a library changes a function's arguments: the channel closes, and the next one may succeed."""
    monkeypatch.setattr(channel.ReplicaChannel, "_ready", lambda: None)
    experts = RemoteExperts(lambda organ: [replica.address], exchange_timeout_s=10.0)
    experts.unavailable(ORGAN)
    (broken,) = experts._channels[ORGAN].values()
    until(lambda: broken.state is ChannelState.CLOSED)
    assert broken.reason == "connecting to a replica failed"
    monkeypatch.undo()
    experts.wait_until_connected([ORGAN], PATIENCE_S)
    replica.compute(experts)
    experts.close()


@pytest.mark.parametrize(
    ("address", "here"),
    [("127.0.0.1:1", True), ("[::1]:1", socket.has_ipv6), ("192.0.2.1:1", False), ("no-such-host.invalid:1", False)],
)
def test_which_addresses_are_this_machines(address: str, here: bool) -> None:
    if address.startswith("[") and not Path("/proc/net/if_inet6").exists():
        pytest.skip("it needs IPv6")
    assert host.is_this_machine(address) == here
