"""What a caller may cost a server: before its credentials are known, while its message arrives, and while it reads."""

import asyncio
import gzip
import os
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from echovlm_ray.config import TLSSection
from echovlm_ray.errors import InvalidRequestError, MessageTooLargeError, OverloadedError
from echovlm_ray.serving.core.caller import Caller, KnownToken, caller_of, current_caller
from echovlm_ray.serving.grpc import auth, interceptor, received_bytes
from echovlm_ray.serving.grpc.incoming import MAX_FIELDS, has_fields_beyond, inflate
from echovlm_ray.serving.grpc.received_bytes import Arrivals, ReceivedBytes, current_receipt, new_receipt
from echovlm_ray.serving.grpc.server import MAX_CALLS_PER_CONNECTION, GrpcServer, ServerOptions
from protos import echovlm_pb2, echovlm_pb2_grpc
from tests.certificates import write_certificates
from tests.waiting import until_async

SERVICE = "echovlm.v1.EchoVLM"
LIMIT = 1024 * 1024
# No window for what the server sends: the client takes in nothing.
DEAF = [("grpc.http2.lookahead_bytes", 0), ("grpc.http2.bdp_probe", 0)]


class Model(echovlm_pb2_grpc.EchoVLMServicer):
    """Answers with the prompt's length, in the requested number of pieces."""

    def __init__(self) -> None:
        self.places = 2
        self.taken = 0
        self.callers: list[Caller] = []
        self.seen: list[int] = []

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self.taken >= self.places:
            raise OverloadedError("all places are taken (gateway.max_requests)")
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    def admit(self, method: str) -> AbstractContextManager[None]:
        return self._place()

    async def Generate(self, request: echovlm_pb2.GenerateRequest, context: Any) -> echovlm_pb2.GenerateResponse:
        self.callers.append(current_caller())
        self.seen.append(len(request.prompt))
        await asyncio.sleep(0.05)
        return echovlm_pb2.GenerateResponse(text=f"{len(request.prompt)}")

    async def GenerateStream(
        self, request: echovlm_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[echovlm_pb2.GenerateEvent]:
        for _ in range(request.max_new_tokens):
            yield echovlm_pb2.GenerateEvent(text="x" * 10_000)


@asynccontextmanager
async def serving(model: Model, **options: Any) -> AsyncIterator[GrpcServer]:
    options = {"max_receive_bytes": LIMIT, "max_received_bytes": 4 * LIMIT, "idle_s": 5.0} | options
    server = GrpcServer(ServerOptions(**options))
    server.add(echovlm_pb2_grpc.add_EchoVLMServicer_to_server, model, SERVICE, model.admit)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)


def method(channel: grpc.aio.Channel, name: str = "Generate") -> Any:
    """The method with messages as they are on the wire."""
    return channel.unary_unary(f"/{SERVICE}/{name}")


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error: grpc.aio.AioRpcError = caught.value
    assert dict(error.trailing_metadata())["x-request-id"]
    return error


def prompt(text: str) -> bytes:
    return echovlm_pb2.GenerateRequest(prompt=text).SerializeToString()


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text("one\ntwo\n")
    path.chmod(0o600)
    return path


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def test_nothing_of_a_message_is_read_before_the_token_and_the_place(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    place = Arrivals.place

    def counted(self: Arrivals, sender: bytes) -> Any:
        read.append(sender)
        return place(self, sender)

    monkeypatch.setattr(Arrivals, "place", counted)
    model = Model()
    async with serving(model, token_file=tokens) as server, grpc.aio.insecure_channel(server.address) as channel:
        for body in (b"", b"\xff" * 1000, bytes(400_000), gzip.compress(bytes(4_000_000))):
            assert (await refused(method(channel)(body))).code() == grpc.StatusCode.UNAUTHENTICATED
        model.places = 0
        error = await refused(method(channel)(b"\xff" * 1000, metadata=bearer("one")))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not read
        model.places = 1
        assert await method(channel)(prompt("abc"), metadata=bearer("one"))
        assert len(read) == 1


@pytest.mark.parametrize(
    "body",
    [b"\xff\xff", b"\x00" * 10, b"\x1a\x02\xff\xfe", b"\x1a\x7f", bytes(200_000), b"\x22\x00" * 100_000],
    ids=["noise", "zeros", "not UTF-8", "cut", "many zeros", "many empty images"],
)
async def test_what_is_no_message_is_an_invalid_argument_with_an_id(body: bytes) -> None:
    model = Model()
    async with serving(model) as server, grpc.aio.insecure_channel(server.address) as channel:
        error = await refused(method(channel)(body))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert str(error.details()).startswith("request: is no message of this method")
        status = rpc_status.from_call(error)
        assert status is not None
        bad = error_details_pb2.BadRequest()
        assert status.details[0].Unpack(bad)
        assert bad.field_violations[0].field == "request"
        assert not model.seen


async def test_a_call_without_a_message_is_one_too() -> None:
    async with serving(Model()) as server, grpc.aio.insecure_channel(server.address) as channel:
        call = channel.stream_unary(f"/{SERVICE}/Generate")()
        await call.done_writing()
        error = await refused(call)
        assert (error.code(), error.details()) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "request: did not come: the call ended without a message",
        )


async def test_gzip_is_understood_and_a_bomb_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    async with serving(model) as server:
        options = [("grpc.max_send_message_length", -1)]
        for compression in (grpc.Compression.Gzip, grpc.Compression.NoCompression):
            async with grpc.aio.insecure_channel(server.address, options, compression=compression) as channel:
                for length in (3, 10_000, 500_000):
                    answer = await method(channel)(prompt("x" * length))
                    assert echovlm_pb2.GenerateResponse.FromString(answer).text == f"{length}"
        async with grpc.aio.insecure_channel(server.address, options, compression=grpc.Compression.Gzip) as channel:
            error = await refused(method(channel)(prompt("x" * 20 * LIMIT)))
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert f"more than the {LIMIT} bytes" in str(error.details())


def test_inflating_stops_at_the_limit() -> None:
    assert inflate(gzip.compress(b"abc"), 3) == b"abc"
    with pytest.raises(MessageTooLargeError):
        inflate(gzip.compress(bytes(4)), 3)
    whole = gzip.compress(os.urandom(100))
    for broken in (whole[:-1], whole + b"x", whole + whole, b"\x1f\x8b" + bytes(20), zlib.compress(b"abc")):
        with pytest.raises(InvalidRequestError, match="request: is compressed"):
            inflate(broken, 10_000)


def test_fields_are_counted_and_no_further_than_need_be() -> None:
    assert not has_fields_beyond(prompt("abc"), 1)
    assert has_fields_beyond(prompt("abc") * 2, 1)
    assert not has_fields_beyond(b"\x08\x01" * MAX_FIELDS, MAX_FIELDS)
    for broken in (b"\x08", b"\x1a\x05abc", b"\x0b", b"\x09" + bytes(7), b"\xff" * 11):
        assert has_fields_beyond(broken, 10)


async def test_messages_arrive_in_places_and_a_slow_one_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received_bytes, "ARRIVE_WITHIN_BUSY_S", 0.3)
    model = Model()
    model.places = 100
    # One place.
    async with (
        serving(model, max_received_bytes=2 * LIMIT) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        silent = channel.stream_unary(f"/{SERVICE}/Generate")()
        await silent.wait_for_connection()
        while not model.taken:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.4)
        assert not silent.done()
        answers = await asyncio.gather(*[method(channel)(prompt("x" * 50_000)) for _ in range(20)])
        assert len(answers) == 20
        error = await refused(silent)
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "did not arrive within 0.3 seconds" in str(error.details())


def silent(channel: grpc.aio.Channel, path: str, count: int, **options: Any) -> list[Any]:
    """Calls of which no message comes."""
    return [channel.stream_unary(path)(**options) for _ in range(count)]


@pytest.mark.parametrize("name", ["Generate", "GetModelInfo"])
async def test_a_caller_whose_messages_do_not_come_keeps_no_other_waiting(tokens: Path, name: str) -> None:
    model = Model()
    model.places = 100
    async with (
        serving(model, token_file=tokens, max_received_bytes=8 * LIMIT) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        calls = silent(channel, f"/{SERVICE}/{name}", 50, metadata=bearer("one"))
        await calls[-1].wait_for_connection()
        await asyncio.sleep(0.2)
        async with asyncio.timeout(received_bytes.ARRIVE_WITHIN_BUSY_S / 2):
            assert await asyncio.gather(*[method(channel)(prompt("abc"), metadata=bearer("two")) for _ in range(20)])
        assert not any(call.done() for call in calls)


async def test_so_many_calls_of_one_caller_wait_for_their_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received_bytes, "MAX_WAITING", 10)
    model = Model()
    model.places = 100
    async with (
        serving(model, max_received_bytes=2 * LIMIT) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        calls = silent(channel, f"/{SERVICE}/Generate", 50)
        await until_async(lambda: sum(call.done() for call in calls) == 39)
        ended = [call for call in calls if call.done()]
        assert {await call.code() for call in ended} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        texts = [str(await call.details()) for call in ended]
        assert all("10 requests of this caller wait" in text for text in texts)


async def test_the_bytes_of_all_messages_that_have_come_are_bounded() -> None:
    received = ReceivedBytes(10, 200)
    first = new_receipt()
    received.hold(b"a", 60)
    new_receipt()
    with pytest.raises(OverloadedError, match="of 60 bytes are under way, and with this one's 41"):
        received.hold(b"b", 41)
    with pytest.raises(OverloadedError, match=r"of this caller of 60 bytes .* this one's 16 .* more than the 75"):
        received.hold(b"a", 16)
    received.hold(b"b", 40)
    first.release()
    first.release()
    assert received.held_bytes == 40
    current_receipt().release()
    assert received.held_bytes == 0


async def test_a_call_gives_its_bytes_back_when_it_ends() -> None:
    model = Model()
    async with (
        serving(model, max_received_bytes=2 * LIMIT) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        for _ in range(8):
            await method(channel)(prompt("x" * 900_000))
        calls = [method(channel)(prompt("x" * 600_000)) for _ in range(2)]
        codes = {await call.code() for call in calls}
        assert codes == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        await method(channel)(prompt("x" * 900_000))


async def test_a_client_that_reads_nothing_keeps_its_place_no_longer_than_its_deadline() -> None:
    model = Model()
    async with serving(model, call_limit_s=0.5) as server, grpc.aio.insecure_channel(server.address, DEAF) as deaf:
        streams = [
            echovlm_pb2_grpc.EchoVLMStub(deaf).GenerateStream(echovlm_pb2.GenerateRequest(max_new_tokens=50))
            for _ in range(2)
        ]
        async with asyncio.timeout(10):
            while model.taken < 2:
                await asyncio.sleep(0.01)
            while model.taken:
                await asyncio.sleep(0.01)
        received = server._interceptor._incoming._received
        assert received is not None
        assert received.held_bytes == 0
        async with grpc.aio.insecure_channel(server.address) as channel:
            assert await method(channel)(prompt("abc"))
        # A caller that begins to read after all gets the status.
        async with asyncio.timeout(10):
            with suppress(grpc.aio.AioRpcError):
                async for _ in streams[0]:
                    pass
            assert await streams[0].code() == grpc.StatusCode.DEADLINE_EXCEEDED
            assert "deadline passed" in await streams[0].details()


async def test_a_client_that_stops_reading_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptor, "STALLED_WRITE_S", 0.3)
    model = Model()
    async with serving(model, call_limit_s=3600.0) as server, grpc.aio.insecure_channel(server.address, DEAF) as deaf:
        stub = echovlm_pb2_grpc.EchoVLMStub(deaf)
        stream = stub.GenerateStream(echovlm_pb2.GenerateRequest(max_new_tokens=50), timeout=3000)
        async with asyncio.timeout(10):
            while not model.taken:
                await asyncio.sleep(0.01)
            while model.taken:
                await asyncio.sleep(0.01)
        stream.cancel()


async def test_calls_end_with_their_token_also_where_nothing_is_read(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "REVOKED_AFTER_S", 0.1)
    model = Model()
    model.places = 3
    async with (
        serving(model, token_file=tokens) as server,
        grpc.aio.insecure_channel(server.address, DEAF) as deaf,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        request = echovlm_pb2.GenerateRequest(max_new_tokens=10**9)
        unread = echovlm_pb2_grpc.EchoVLMStub(deaf).GenerateStream(request, metadata=bearer("one"))
        stub = echovlm_pb2_grpc.EchoVLMStub(channel)
        read = aiter(stub.GenerateStream(request, metadata=bearer("one")))
        other = aiter(stub.GenerateStream(echovlm_pb2.GenerateRequest(max_new_tokens=500), metadata=bearer("two")))
        for stream in (read, other):
            assert await anext(stream)
        while model.taken < 3:
            await asyncio.sleep(0.01)
        tokens.write_text("two\n")
        async with asyncio.timeout(10):
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                async for _ in read:
                    pass
            assert (ended.value.code(), ended.value.details()) == (grpc.StatusCode.UNAUTHENTICATED, auth.REVOKED)
            assert len([event async for event in other]) == 499
            while model.taken:
                await asyncio.sleep(0.01)
            with suppress(grpc.aio.AioRpcError):
                async for _ in unread:
                    pass
            assert await unread.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_callers_that_are_gone_already_are_no_failures(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Model()) as server, grpc.aio.insecure_channel(server.address) as channel:
        for _ in range(100):
            call = method(channel)(prompt("abc"), timeout=0.001)
            await asyncio.sleep(0.0005)
            call.cancel()
        await asyncio.sleep(0.2)
        while server.active_calls:
            await asyncio.sleep(0.01)
    assert not [record for record in caplog.records if "failed" in record.message]


@pytest.mark.parametrize(("count", "connections"), [(4000, 4), (3 * MAX_CALLS_PER_CONNECTION, 1)])
async def test_thousands_at_once_all_get_a_typed_answer(count: int, connections: int) -> None:
    model = Model()
    model.places = 8
    async with serving(model) as server:
        channels = [
            grpc.aio.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
            for _ in range(connections)
        ]
        calls = [method(channels[index % connections])(prompt("abc"), timeout=60) for index in range(count)]
        codes = {await call.code() for call in calls}
        assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        for call in calls:
            if await call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                assert "gateway.max_requests" in await call.details()
        for channel in channels:
            await channel.close()


async def test_callers_are_told_apart_by_their_tokens(tokens: Path) -> None:
    model = Model()
    async with serving(model, token_file=tokens) as server, grpc.aio.insecure_channel(server.address) as channel:
        for token in ("one", "two", "one"):
            await method(channel)(prompt("abc"), metadata=bearer(token))
    first, second, again = model.callers
    assert first == again != second
    assert len(first.id) == len(second.id) == 32


async def test_a_token_that_is_not_checked_makes_no_caller() -> None:
    model = Model()
    async with serving(model) as server, grpc.aio.insecure_channel(server.address) as channel:
        for token in ("one", "two"):
            await method(channel)(prompt("abc"), metadata=bearer(token))
    assert model.callers == [Caller(), Caller()]


async def test_callers_are_told_apart_by_their_certificates_also_without_names(tmp_path: Path) -> None:
    write_certificates(tmp_path)
    authority = (tmp_path / "ca.pem").read_bytes()
    model = Model()
    tls = TLSSection(
        certificate=tmp_path / "server.pem", key=tmp_path / "server.key", client_authority=tmp_path / "ca.pem"
    )
    async with serving(model, tls=tls) as server:
        for name in ("client", "nameless", "client"):
            own = [(tmp_path / f"{name}.{kind}").read_bytes() for kind in ("key", "pem")]
            credentials = grpc.ssl_channel_credentials(authority, *own)
            async with grpc.aio.secure_channel(server.address, credentials) as channel:
                await method(channel)(prompt("abc"))
    first, second, again = model.callers
    assert first == again
    assert set(first.names) == {"localhost", "127.0.0.1", "::1"}
    assert len(second.id) == 32
    assert second.id != first.id


def test_what_makes_a_caller() -> None:
    one, two = KnownToken(b"1" * 32), KnownToken(b"2" * 32)
    assert caller_of(one, None) == caller_of(one, None) != caller_of(two, None)
    assert caller_of(None, None) == Caller()
    assert caller_of(None, [b"a", b"b"]).id != caller_of(None, [b"ab"]).id
    assert caller_of(None, [b"ward", b"10.0.0.5"]).names == ("10.0.0.5", "ward")
    assert caller_of(one, [b"ward"]).names == ("ward",)
    assert caller_of(KnownToken(b"1" * 32, "night"), [b"ward"]).names == ("night",)
    # Tokens of one name are one caller's, so that it can replace one by another.
    assert caller_of(KnownToken(b"1" * 32, "ward"), None) == caller_of(KnownToken(b"2" * 32, "ward"), None)
    assert caller_of(KnownToken(b"1" * 32, "ward"), None) != caller_of(None, [b"ward"])
