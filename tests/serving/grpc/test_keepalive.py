"""Raw HTTP/2, for what a gRPC client would not do: the effects of a server's options on its connections."""

import asyncio
import socket
import time
from contextlib import suppress

import pytest

from echovlm_ray.serving.grpc import server as module
from echovlm_ray.serving.grpc.server import GrpcServer, ServerOptions

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
PING, PING_ACK, GOAWAY = 6, 1, 7


class Connection:
    """One connection that sends frames of its own."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=10)
        self._socket.sendall(PREFACE)

    def ping(self) -> None:
        # After a GOAWAY the connection ends.
        with suppress(OSError):
            self._socket.sendall(b"\x00\x00\x08\x06\x00\x00\x00\x00\x00" + bytes(8))

    def frames(self, seconds: float) -> list[tuple[int, int]]:
        """Kind and flags of all frames that come in some seconds, or until the connection ends."""
        found, pending, until = [], b"", time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                received = self._socket.recv(65536)
            except OSError:
                break
            if not received:
                break
            pending += received
            while len(pending) >= 9 and len(pending) >= 9 + int.from_bytes(pending[:3]):
                found.append((pending[3], pending[4]))
                pending = pending[9 + int.from_bytes(pending[:3]) :]
        return found

    def close(self) -> None:
        self._socket.close()


async def frames_of_an_idle_client(pings: int, every_s: float) -> list[tuple[int, int]]:
    def act(address: str) -> list[tuple[int, int]]:
        connection = Connection(address)
        found = []
        for _ in range(pings):
            connection.ping()
            found += connection.frames(every_s)
        connection.close()
        return found

    server = GrpcServer(ServerOptions())
    await server.start()
    try:
        return await asyncio.to_thread(act, server.address)
    finally:
        await server.stop(0)


async def test_a_client_that_pings_as_often_as_it_may_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_PING_MS", 100)
    found = await frames_of_an_idle_client(8, 0.2)
    assert [kind for kind, _ in found].count(GOAWAY) == 0
    assert found.count((PING, PING_ACK)) == 8


async def test_one_that_pings_more_often_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_PING_MS", 60_000)
    found = await frames_of_an_idle_client(8, 0.2)
    assert GOAWAY in [kind for kind, _ in found]


async def test_the_limit_lets_idle_clients_ping_every_twenty_seconds() -> None:
    assert module.MIN_PING_MS <= 20_000


async def test_an_idle_client_is_asked_whether_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEPALIVE_MS", 300)
    found = await frames_of_an_idle_client(1, 1.5)
    assert (PING, 0) in found
