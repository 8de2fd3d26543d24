import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from echovlm_ray.config import TLSSection
from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.serving.grpc.request_id import REQUEST_ID_KEY, current_request_id
from echovlm_ray.serving.grpc.server import GrpcServer, ServerOptions
from protos import control_pb2, control_pb2_grpc
from tests.certificates import write_certificates

SERVICE = "echovlm.v1.ExpertControl"


class Control(control_pb2_grpc.ExpertControlServicer):
    """Does what each test tells it to."""

    def __init__(self) -> None:
        self.on_list: Callable[[], Any] = control_pb2.ListResponse
        self.seen: list[str] = []
        self.closed = asyncio.Event()

    async def List(
        self, request: control_pb2.ListRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ListResponse:
        self.seen.append(current_request_id())
        result = self.on_list()
        response: control_pb2.ListResponse = await result if asyncio.iscoroutine(result) else result
        return response

    async def Watch(
        self, request: control_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.ControlState]:
        try:
            for number in range(1000):
                yield control_pb2.ControlState(version=number)
                if number == 2 and self.on_list is not control_pb2.ListResponse:
                    self.on_list()
                await asyncio.sleep(0.01)
        finally:
            self.closed.set()


@asynccontextmanager
async def serving(control: Control, **options: Any) -> AsyncIterator[GrpcServer]:
    server = GrpcServer(ServerOptions(**options))
    server.add(control_pb2_grpc.add_ExpertControlServicer_to_server, control, SERVICE)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)


@asynccontextmanager
async def connected(control: Control, **options: Any) -> AsyncIterator[grpc.aio.Channel]:
    async with serving(control, **options) as server, grpc.aio.insecure_channel(server.address) as channel:
        yield channel


def stub(channel: grpc.aio.Channel) -> control_pb2_grpc.ExpertControlStub:
    return control_pb2_grpc.ExpertControlStub(channel)


def raising(error: Exception) -> Callable[[], Any]:
    def act() -> Any:
        raise error

    return act


async def test_a_call_is_answered_and_its_id_echoed_both_ways() -> None:
    control = Control()
    async with connected(control) as channel:
        call = stub(channel).List(control_pb2.ListRequest(), metadata=((REQUEST_ID_KEY, "abc-1"),))
        await call
        assert dict(await call.initial_metadata())[REQUEST_ID_KEY] == "abc-1"
        assert dict(await call.trailing_metadata())[REQUEST_ID_KEY] == "abc-1"
        assert control.seen == ["abc-1"]


@pytest.mark.parametrize("sent", [None, "", "x" * 129, "patient Jane Doe"])
async def test_a_missing_or_unusable_id_is_replaced(sent: str | None) -> None:
    control = Control()
    async with connected(control) as channel:
        metadata = () if sent is None else ((REQUEST_ID_KEY, sent),)
        call = stub(channel).List(control_pb2.ListRequest(), metadata=metadata)
        await call
        echoed = dict(await call.initial_metadata())[REQUEST_ID_KEY]
        assert echoed != sent
        assert len(echoed) == 32
        assert control.seen == [echoed]


async def test_a_typed_error_arrives_with_its_details_and_the_id() -> None:
    control = Control()
    control.on_list = raising(InvalidRequestError("organ", "is too long"))
    async with connected(control) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub(channel).List(control_pb2.ListRequest(), metadata=((REQUEST_ID_KEY, "abc-2"),))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(caught.value)
    bad_request = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad_request)
    assert bad_request.field_violations[0].field == "organ"
    assert dict(caught.value.trailing_metadata())[REQUEST_ID_KEY] == "abc-2"


async def test_an_unexpected_error_tells_the_client_nothing_and_the_log_its_place_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    control = Control()
    control.on_list = raising(RuntimeError("Jane Doe, born 1970"))
    async with serving(control) as server, grpc.aio.insecure_channel(server.address) as channel:
        with caplog.at_level(logging.ERROR), pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub(channel).List(control_pb2.ListRequest(), metadata=((REQUEST_ID_KEY, "abc-3"),))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    seen = f"{caught.value.details()} {caught.value.trailing_metadata()}"
    assert "Jane" not in seen
    assert "Traceback" not in seen
    assert "test_server.py" not in seen
    assert "abc-3" in caplog.text
    assert "test_server.py" in caplog.text
    assert "RuntimeError" in caplog.text
    assert "Jane" not in caplog.text


async def test_an_error_in_the_middle_of_a_stream_is_mapped_after_what_came_before() -> None:
    control = Control()
    control.on_list = raising(InvalidRequestError("x", "wrong"))
    async with connected(control) as channel:
        call = stub(channel).Watch(control_pb2.WatchRequest())
        assert [(await call.read()).version for _ in range(3)] == [0, 1, 2]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_leaving_a_stream_ends_the_servicer() -> None:
    control = Control()
    async with connected(control) as channel:
        call = stub(channel).Watch(control_pb2.WatchRequest())
        await call.read()
        call.cancel()
        await asyncio.wait_for(control.closed.wait(), 5)


async def test_a_request_over_the_limit_is_refused_and_the_next_one_served() -> None:
    async with connected(Control(), max_receive_bytes=1000) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub(channel).List(control_pb2.ListRequest(organ="x" * 2000))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1000" in str(caught.value.details())
        await stub(channel).List(control_pb2.ListRequest(organ="x" * 900))


class TestTokens:
    @pytest.fixture
    def tokens(self, tmp_path: Path) -> Path:
        path = tmp_path / "tokens"
        path.touch(0o600)
        path.write_text("# who\nfirst\n\n second \n")
        return path

    @pytest.mark.parametrize(
        ("header", "served"),
        [
            ("Bearer first", True),
            ("bearer second", True),
            ("Bearer third", False),
            ("Bearer firs", False),
            ("Bearer # who", False),
            ("Bearer ", False),
            ("Basic first", False),
            (None, False),
        ],
    )
    async def test_only_known_tokens_pass(self, tokens: Path, header: str | None, served: bool) -> None:
        control = Control()
        async with connected(control, token_file=tokens) as channel:
            metadata = () if header is None else (("authorization", header),)
            call = stub(channel).List(control_pb2.ListRequest(), metadata=metadata)
            if served:
                await call
                return
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert not control.seen

    async def test_streams_are_guarded_too(self, tokens: Path) -> None:
        async with connected(Control(), token_file=tokens) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub(channel).Watch(control_pb2.WatchRequest()).read()
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED

    async def test_health_checks_need_no_token_and_reflection_does(self, tokens: Path) -> None:
        async with connected(Control(), token_file=tokens) as channel:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await list_services(channel)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED

    async def test_a_new_token_counts_without_a_restart(self, tokens: Path) -> None:
        async with connected(Control(), token_file=tokens) as channel:
            tokens.write_text("fourth\n")
            await stub(channel).List(control_pb2.ListRequest(), metadata=(("authorization", "Bearer fourth"),))
            with pytest.raises(grpc.aio.AioRpcError):
                await stub(channel).List(control_pb2.ListRequest(), metadata=(("authorization", "Bearer first"),))

    @pytest.mark.parametrize("content", [None, "", "# nothing\n"])
    async def test_a_file_without_tokens_is_refused_at_start(self, tmp_path: Path, content: str | None) -> None:
        path = tmp_path / "tokens"
        if content is not None:
            path.touch(0o600)
            path.write_text(content)
        with pytest.raises(ValueError, match="token_file"):
            GrpcServer(ServerOptions(token_file=path))


class TestTLS:
    async def test_a_client_that_trusts_the_authority_is_served_and_plain_text_is_not(self, tmp_path: Path) -> None:
        write_certificates(tmp_path)
        tls = TLSSection(certificate=tmp_path / "server.pem", key=tmp_path / "server.key")
        async with serving(Control(), tls=tls) as server:
            credentials = grpc.ssl_channel_credentials((tmp_path / "ca.pem").read_bytes())
            async with grpc.aio.secure_channel(server.address, credentials) as channel:
                await stub(channel).List(control_pb2.ListRequest(), timeout=10)
            async with grpc.aio.insecure_channel(server.address) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub(channel).List(control_pb2.ListRequest(), timeout=5)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE

    async def test_a_client_without_a_certificate_is_refused_where_one_is_asked_for(self, tmp_path: Path) -> None:
        write_certificates(tmp_path)
        tls = TLSSection(
            certificate=tmp_path / "server.pem", key=tmp_path / "server.key", client_authority=tmp_path / "ca.pem"
        )
        async with serving(Control(), tls=tls) as server:
            authority = (tmp_path / "ca.pem").read_bytes()
            async with grpc.aio.secure_channel(server.address, grpc.ssl_channel_credentials(authority)) as channel:
                with pytest.raises(grpc.aio.AioRpcError):
                    await stub(channel).List(control_pb2.ListRequest(), timeout=5)
            credentials = grpc.ssl_channel_credentials(
                authority, (tmp_path / "client.key").read_bytes(), (tmp_path / "client.pem").read_bytes()
            )
            async with grpc.aio.secure_channel(server.address, credentials) as channel:
                await stub(channel).List(control_pb2.ListRequest(), timeout=10)

    async def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"tls\.key .*key\.pem cannot be read"):
            GrpcServer(ServerOptions(tls=TLSSection(certificate=tmp_path / "absent.pem", key=tmp_path / "key.pem")))


async def list_services(channel: grpc.aio.Channel) -> set[str]:
    requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(requests))
    response = await call.read()
    return {service.name for service in response.list_services_response.service}


async def test_reflection_names_all_services() -> None:
    async with connected(Control()) as channel:
        names = await list_services(channel)
    assert names == {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_health_is_checked_and_watched() -> None:
    async with serving(Control()) as server, grpc.aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(request)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        watch = health.Watch(request)
        states = [(await watch.read()).status]
        for serving_now in (True, False):
            await server.set_health(SERVICE, serving_now)
            states.append((await watch.read()).status)
        expected = ("SERVICE_UNKNOWN", "SERVING", "NOT_SERVING")
        assert states == [health_pb2.HealthCheckResponse.ServingStatus.Value(name) for name in expected]
        assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


class TestStop:
    async def test_calls_under_way_finish_and_new_ones_go_elsewhere(self) -> None:
        control = Control()
        go_on = asyncio.Event()

        async def slowly() -> control_pb2.ListResponse:
            await go_on.wait()
            return control_pb2.ListResponse()

        control.on_list = slowly
        async with serving(control) as server, grpc.aio.insecure_channel(server.address) as channel:
            under_way = asyncio.ensure_future(stub(channel).List(control_pb2.ListRequest()))
            while not server.active_calls:
                await asyncio.sleep(0.01)
            stopping = asyncio.ensure_future(server.stop(20))
            await asyncio.sleep(0.05)
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub(channel).List(control_pb2.ListRequest())
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            info = error_details_pb2.ErrorInfo()
            assert any(detail.Unpack(info) for detail in rpc_status.from_call(caught.value).details)
            assert info.reason == "SHUTTING_DOWN"
            assert not stopping.done()
            go_on.set()
            await under_way
            await asyncio.wait_for(stopping, 5)

    async def test_a_stream_that_never_ends_is_not_waited_for(self) -> None:
        async with serving(Control()) as server, grpc.aio.insecure_channel(server.address) as channel:
            call = stub(channel).Watch(control_pb2.WatchRequest())
            await call.read()
            await asyncio.wait_for(server.stop(60), 5)

    async def test_work_inside_such_a_stream_is(self) -> None:
        async with serving(Control()) as server:
            pending = [True]
            stopping = asyncio.ensure_future(server.stop(60, [lambda: bool(pending)]))
            await asyncio.sleep(0.2)
            assert not stopping.done()
            pending.clear()
            await asyncio.wait_for(stopping, 5)

    async def test_what_takes_longer_than_the_grace_time_is_cancelled(self) -> None:
        control = Control()
        control.on_list = lambda: asyncio.sleep(60)
        async with serving(control) as server, grpc.aio.insecure_channel(server.address) as channel:
            under_way = asyncio.ensure_future(stub(channel).List(control_pb2.ListRequest()))
            while not server.active_calls:
                await asyncio.sleep(0.01)
            await asyncio.wait_for(server.stop(0.3), 5)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await under_way
            assert caught.value.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


async def test_an_address_that_is_not_ours_is_refused_in_words() -> None:
    server = GrpcServer(ServerOptions(host="192.0.2.77", port=4711))
    with pytest.raises(ValueError, match=r"cannot listen on 192\.0\.2\.77:4711"):
        await server.start()


async def test_replicas_share_a_fixed_port_and_never_a_free_one() -> None:
    async with serving(Control()) as first:
        port = int(first.address.rpartition(":")[2])
        with pytest.raises(ValueError, match="cannot listen"):
            async with serving(Control(), port=port):
                pass
    async with serving(Control(), port=port), serving(Control(), port=port) as second:
        assert second.address.endswith(f":{port}")
