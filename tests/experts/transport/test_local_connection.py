"""Both ends of a local connection, in one process."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experts.transport.local_connection import (
    MAX_PACKET_BYTES,
    MAX_UNANSWERED,
    LocalConnection,
    LocalConnectionError,
    listen_on,
    unsupported,
)

PATIENCE_S = 20

Pair = tuple[LocalConnection, LocalConnection]


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with listen_on(str(tmp_path / "socket")) as listening:
        yield listening


@pytest.fixture
def pair(listening: socket.socket) -> Iterator[Pair]:
    caller = LocalConnection.connect(listening.getsockname(), PATIENCE_S)
    server = LocalConnection(listening.accept()[0])
    server.set_timeout(PATIENCE_S)
    yield caller, server
    caller.close()
    server.close()


def test_packets_keep_their_borders_and_their_order(pair: Pair) -> None:
    caller, server = pair
    packets = [b"a", b"b" * MAX_PACKET_BYTES, b"c", os.urandom(1000)]
    for sender, receiver in ((caller, server), (server, caller)):
        for packet in packets:
            sender.send(packet)
        assert [receiver.receive() for _ in packets] == packets
    assert caller.connected
    assert server.connected


def test_a_descriptor_goes_with_a_packet(pair: Pair) -> None:
    caller, server = pair
    memory = os.memfd_create("test")
    os.pwrite(memory, b"the same", 0)
    caller.send(b"attach", memory)
    caller.send(b"next")
    packet, descriptor = server.receive_with_descriptor()
    assert packet == b"attach"
    assert descriptor is not None
    assert not os.get_inheritable(descriptor)
    assert os.pread(descriptor, 8, 0) == b"the same"
    assert server.receive_with_descriptor() == (b"next", None)
    for each in (memory, descriptor):
        os.close(each)


def test_of_several_descriptors_none_is_kept(pair: Pair) -> None:
    caller, server = pair
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(caller._socket, [b"x"], [0, 1, 2])
    with pytest.raises(LocalConnectionError, match="more than one descriptor"):
        server.receive_with_descriptor()
    # One that is not asked for is not taken either.
    caller.send(b"x", 0)
    assert server.receive() == b"x"
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_long_packet_is_not_sent_and_not_taken(pair: Pair) -> None:
    caller, server = pair
    with pytest.raises(LocalConnectionError, match=f"has {MAX_PACKET_BYTES + 1} bytes"):
        caller.send(bytes(MAX_PACKET_BYTES + 1))
    for receive in (server.receive, server.receive_with_descriptor):
        caller._socket.send(bytes(MAX_PACKET_BYTES + 1))
        with pytest.raises(LocalConnectionError, match="more than"):
            receive()


def test_so_many_packets_fit_that_neither_end_waits(pair: Pair) -> None:
    caller, server = pair
    for _ in range(MAX_UNANSWERED):
        caller.send(bytes(500))
        server.send(bytes(4000))


def test_a_socket_that_is_full_is_not_waited_for(pair: Pair) -> None:
    caller, server = pair

    def flood() -> None:
        while True:
            caller.send(bytes(500))

    with pytest.raises(LocalConnectionError, match="does not read"):
        flood()
    assert server.receive() == bytes(500)


def test_a_thread_that_waits_is_released_by_closing_here(pair: Pair) -> None:
    caller, _ = pair
    caller.set_timeout(None)
    closing = threading.Timer(0.1, caller.close)
    closing.start()
    with pytest.raises(LocalConnectionError):
        caller.receive()
    closing.join()
    assert not caller.connected
    caller.close()
    for use in (caller.receive, caller.receive_with_descriptor):
        with pytest.raises(LocalConnectionError):
            use()
    with pytest.raises(LocalConnectionError):
        caller.send(b"x")


def test_a_thread_that_waits_is_released_by_closing_there(pair: Pair) -> None:
    caller, server = pair
    server.send(b"the last")
    server.close()
    assert not caller.connected
    assert caller.receive() == b"the last"
    with pytest.raises(LocalConnectionError, match="closed the connection"):
        caller.receive()
    with pytest.raises(LocalConnectionError, match="Broken pipe"):
        caller.send(b"x")


def test_closing_in_the_middle_of_everything_uses_no_other_file(pair: Pair, tmp_path: Path) -> None:
    """A number that was closed is the next file's: nothing may be read from or written to that."""
    caller, server = pair

    def talk() -> None:
        try:
            while True:
                caller.send(b"x")
                server.receive()
        except LocalConnectionError:
            return

    with ThreadPoolExecutor(2) as pool:
        talking = [pool.submit(talk) for _ in range(2)]
        time.sleep(0.05)
        caller.close()
        server.close()
        with (tmp_path / "file").open("wb+") as file:
            for each in talking:
                each.result(PATIENCE_S)
            assert file.read() == b""
    assert not (tmp_path / "file").stat().st_size


def test_an_answer_that_does_not_come_is_not_waited_for(listening: socket.socket) -> None:
    caller = LocalConnection.connect(listening.getsockname(), 0.05)
    with pytest.raises(LocalConnectionError, match="does not answer"):
        caller.receive()
    caller.close()


def test_where_nothing_is_nothing_is_connected_to(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LocalConnection.connect(str(tmp_path / "socket"), 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(str(tmp_path / "socket"))
        with pytest.raises(LocalConnectionError, match="Connection refused"):
            LocalConnection.connect(str(tmp_path / "socket"), 1)
    with pytest.raises(OSError, match="in use"):
        listen_on(str(tmp_path / "socket"))


def test_another_users_process_is_refused_by_both(listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(LocalConnectionError, match=f"is of user {user}, and this one of user {user + 1}"):
        LocalConnection.connect(listening.getsockname(), 1)
    with pytest.raises(LocalConnectionError, match=f"is of user {user}"):
        LocalConnection(listening.accept()[0])


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_another_user_that_gets_through_to_the_socket_is_refused() -> None:
    # An abstract name has no folder that would keep another user away.
    name = f"\0echovlm-test-{os.getpid()}"
    with listen_on(name) as listening:
        code = f"import socket; s = socket.socket(socket.AF_UNIX, 5); s.connect({name!r}); print(s.recv(1))"
        command = ["python3", "-c", code]
        with subprocess.Popen(command, user=65534, group=65534, stdout=subprocess.PIPE, text=True) as other:
            with pytest.raises(LocalConnectionError, match="is of user 65534"):
                LocalConnection(listening.accept()[0])
            assert other.stdout is not None
            assert other.stdout.read() == "b''\n"


def test_other_systems_are_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unsupported() is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert unsupported() == "it needs Linux"
