"""The local path to a replica, broken on purpose in each of its steps: gRPC carries the calls, with one warning."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from experts.group import ExpertGroup
from experts.transport import attached_memory, host, local_connection
from experts.transport.attached_memory import AttachError
from experts.transport.local_connection import MAX_PACKET_BYTES, LocalConnection
from experts.transport.secret import SystemSecret
from protos import expert_pb2
from router.dispatch import channel, local_path
from router.dispatch.channel import ChannelState
from router.dispatch.pending_call import ReplicaLostError
from router.dispatch.remote import RemoteExperts
from router.errors import ExpertsUnavailableError
from tests.expert_servers import ServerThread, expert_group, server_thread
from tests.router.scripted_replica import ORGAN, PATIENCE_S, Replica, attach, read, scripted
from tests.split_golden import SplitGolden, split_golden
from tests.waiting import until


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
