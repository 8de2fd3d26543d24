"""Streams on gRPC's core, both ends of ours, and each against grpcio's public interface."""

import secrets
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc._cython import cygrpc

from experts.transport.grpc_core import MAX_UNSENT, DirectCall, DirectServer, ServerStream, StreamEndedError, missing
from tests.waiting import until

METHOD = "/test.Echo/Forward"
UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class Echo:
    """Gives messages back: at once, or when told to."""

    def __init__(self) -> None:
        self.streams: list[ServerStream] = []
        self.waiting: list[tuple[ServerStream, bytes]] = []
        self.at_once = True
        self.received_count = 0
        self.closed_count = 0

    def accept(self, stream: ServerStream) -> "Handler":
        self.streams.append(stream)
        return Handler(self, stream)


class Handler:
    def __init__(self, echo: Echo, stream: ServerStream) -> None:
        self.echo, self.stream = echo, stream

    def received(self, message: bytes) -> None:
        self.echo.received_count += 1
        if self.echo.at_once:
            self.stream.answer(message)
        else:
            self.echo.waiting.append((self.stream, message))

    def closed(self) -> None:
        self.echo.closed_count += 1


@pytest.fixture
def address() -> str:
    return f"unix-abstract:echovlm-test-{secrets.token_hex(8)}"


@pytest.fixture
def echo(address: str) -> Iterator[Echo]:
    echo = Echo()
    server = DirectServer(address, METHOD, echo.accept, UNLIMITED)
    yield echo
    server.stop()
    server.stop()


@pytest.fixture
def channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address, options=UNLIMITED) as channel:
        yield channel


@pytest.fixture
def call(channel: grpc.Channel, echo: Echo) -> Iterator[DirectCall]:
    call = DirectCall(channel, METHOD)
    yield call
    call.cancel("the test is over")
    call.drain()


def test_messages_of_all_sizes_come_back_in_order(call: DirectCall) -> None:
    messages = [b"", b"a", secrets.token_bytes(100_000), secrets.token_bytes(9 * 1024**2), b"z"]
    for message in messages:
        call.send(message)
        assert call.receive() == message
    for message in messages:
        call.send(message)
    assert [call.receive() for _ in messages] == messages
    assert call.connected


def test_answers_may_come_late_from_any_thread_and_in_any_order(echo: Echo, call: DirectCall) -> None:
    echo.at_once = False
    for number in range(MAX_UNSENT * 4):
        call.send(bytes([number]))
    until(lambda: len(echo.waiting) == MAX_UNSENT * 4)
    with ThreadPoolExecutor(4) as pool:
        for stream, message in reversed(echo.waiting):
            pool.submit(stream.answer, message)
        received = {call.receive() for _ in range(MAX_UNSENT * 4)}
    assert received == {bytes([number]) for number in range(MAX_UNSENT * 4)}


def test_streams_do_not_disturb_each_other(channel: grpc.Channel, echo: Echo) -> None:
    calls = [DirectCall(channel, METHOD) for _ in range(8)]

    def talk(number: int) -> None:
        for turn in range(50):
            message = bytes([number, turn])
            calls[number].send(message)
            assert calls[number].receive() == message

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(talk, number) for number in range(8)]:
            done.result(20)
    for each in calls:
        each.cancel("over")
        each.drain()
    until(lambda: echo.closed_count == 8)


def test_a_stream_of_the_public_client_ends_well(channel: grpc.Channel, echo: Echo) -> None:
    messages = [secrets.token_bytes(size) for size in (1, 70_000, 5)]
    assert list(channel.stream_stream(METHOD)(iter(messages), timeout=10)) == messages
    until(lambda: echo.closed_count == 1)


def test_owed_answers_are_sent_after_the_caller_has_finished(channel: grpc.Channel, echo: Echo) -> None:
    echo.at_once = False
    responses = channel.stream_stream(METHOD)(iter([b"one", b"two"]), timeout=10)
    until(lambda: len(echo.waiting) == 2)
    for stream, message in echo.waiting:
        stream.answer(message)
    assert list(responses) == [b"one", b"two"]


def test_another_method_is_unimplemented(channel: grpc.Channel, echo: Echo) -> None:
    call = DirectCall(channel, "/test.Echo/Backward")
    with pytest.raises(StreamEndedError, match="UNIMPLEMENTED"):
        call.receive()
    call.drain()
    with pytest.raises(grpc.RpcError) as failure:
        list(channel.stream_stream("/test.Other/Forward")(iter([b"x"]), timeout=10))
    assert failure.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert not echo.streams


def test_the_server_ends_a_stream_after_its_answer(echo: Echo, call: DirectCall) -> None:
    echo.at_once = False
    call.send(b"x")
    until(lambda: echo.waiting)
    (stream,) = echo.streams
    stream.answer(b"y" * 3_000_000)
    stream.end(grpc.StatusCode.FAILED_PRECONDITION, "not like this")
    assert call.receive() == b"y" * 3_000_000
    with pytest.raises(StreamEndedError, match="FAILED_PRECONDITION: not like this"):
        call.receive()
    with pytest.raises(StreamEndedError):
        call.send(b"z")
    stream.answer(b"late")


def test_a_caller_that_reads_nothing_is_not_read_for_ever(channel: grpc.Channel, echo: Echo) -> None:
    stopping = threading.Event()

    def flood() -> Iterator[bytes]:
        while not stopping.is_set():
            yield b"x" * 100_000

    responses = channel.stream_stream(METHOD)(flood())
    before = -1
    while echo.received_count != before:
        before = echo.received_count
        time.sleep(0.5)
    stopping.set()
    (stream,) = echo.streams
    assert len(stream._unsent) <= MAX_UNSENT
    responses.cancel()
    other = DirectCall(channel, METHOD)
    other.send(b"still here")
    assert other.receive() == b"still here"
    other.cancel("over")
    other.drain()


def test_cancelling_releases_whoever_waits(echo: Echo, call: DirectCall) -> None:
    echo.at_once = False
    call.send(b"x")
    timer = threading.Timer(0.1, call.cancel, ["enough"])
    timer.start()
    with pytest.raises(StreamEndedError, match="CANCELLED"):
        call.receive()
    timer.join()
    call.drain()
    call.drain()
    call.cancel("again")
    until(lambda: echo.closed_count == 1)
    echo.waiting[0][0].answer(b"late")


def test_a_stopped_server_ends_its_streams_and_its_thread(address: str, channel: grpc.Channel) -> None:
    echo = Echo()
    server = DirectServer(address, METHOD, echo.accept)
    call = DirectCall(channel, METHOD)
    call.send(b"x")
    assert call.receive() == b"x"
    server.stop()
    assert not server._thread.is_alive()
    with pytest.raises(StreamEndedError):
        call.receive()
    until(lambda: not call.connected)
    call.drain()
    echo.streams[0].answer(b"late")
    refused = DirectCall(channel, METHOD)
    with pytest.raises(StreamEndedError, match="UNAVAILABLE"):
        refused.receive()
    refused.drain()


def test_an_address_that_is_taken_is_refused(address: str, echo: Echo) -> None:
    with pytest.raises(OSError, match="cannot listen"):
        DirectServer(address, METHOD, echo.accept)


def test_what_a_handler_raises_is_logged_without_its_text(
    address: str, channel: grpc.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def received(self, message: bytes) -> None:
            raise RuntimeError("patient 12345")

        def closed(self) -> None:
            return

    server = DirectServer(address, METHOD, lambda stream: Broken())
    call = DirectCall(channel, METHOD)
    call.send(b"x")
    until(lambda: "RuntimeError" in caplog.text)
    assert "12345" not in caplog.text.replace('raise RuntimeError("patient 12345")', "")
    call.cancel("over")
    call.drain()
    server.stop()


def test_another_grpcio_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing() is None
    monkeypatch.delattr(cygrpc, "SegregatedCall")
    assert "has no SegregatedCall" in str(missing())
    monkeypatch.setattr(sys, "platform", "darwin")
    assert missing() == "it needs Linux"
