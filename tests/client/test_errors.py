import grpc
import pytest
from google.rpc import error_details_pb2

from echovlm_ray import client as api
from protos import echovlm_pb2
from tests.client.scripted_server import ScriptedEchoVLM, retry_info, serving, status

CODES = grpc.StatusCode
BAD_REQUEST = error_details_pb2.BadRequest(
    field_violations=[
        error_details_pb2.BadRequest.FieldViolation(field="images[1].content", description="is no image"),
        error_details_pb2.BadRequest.FieldViolation(field="prompt", description="is too long"),
    ]
)


@pytest.mark.parametrize(
    ("code", "expected", "builtin"),
    [
        (CODES.INVALID_ARGUMENT, api.InvalidRequestError, ValueError),
        (CODES.UNAUTHENTICATED, api.UnauthenticatedError, RuntimeError),
        (CODES.PERMISSION_DENIED, api.PermissionDeniedError, RuntimeError),
        (CODES.NOT_FOUND, api.NotFoundError, LookupError),
        (CODES.FAILED_PRECONDITION, api.FailedPreconditionError, RuntimeError),
        (CODES.RESOURCE_EXHAUSTED, api.OverloadedError, RuntimeError),
        (CODES.DEADLINE_EXCEEDED, api.DeadlineExceededError, TimeoutError),
        (CODES.CANCELLED, api.CallCancelledError, RuntimeError),
        (CODES.INTERNAL, api.InternalServerError, RuntimeError),
        (CODES.UNKNOWN, api.InternalServerError, RuntimeError),
        (CODES.ABORTED, api.EchoVLMError, RuntimeError),
    ],
)
def test_each_status_has_its_type(
    servicer: ScriptedEchoVLM, address: str, code: grpc.StatusCode, expected: type[Exception], builtin: type[Exception]
) -> None:
    servicer.failures = [status(code, "the reason and the fix")]
    with api.EchoVLMClient(address, retry=False) as client, pytest.raises(api.EchoVLMError) as caught:
        client.generate(b"x", request_id="my-id")
    assert type(caught.value) is expected
    assert isinstance(caught.value, builtin)
    assert str(caught.value) == "the reason and the fix"
    assert caught.value.code is code
    assert caught.value.request_id == "my-id"


def test_field_violations_are_read(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.failures = [status(CODES.INVALID_ARGUMENT, "two fields are wrong", BAD_REQUEST)]
    with api.EchoVLMClient(address) as client, pytest.raises(api.InvalidRequestError) as caught:
        client.generate(b"x")
    assert caught.value.violations == (
        api.FieldViolation("images[1].content", "is no image"),
        api.FieldViolation("prompt", "is too long"),
    )


def test_overload_says_when_to_come_back(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.failures = [status(CODES.RESOURCE_EXHAUSTED, "64 requests wait", retry_info(2.5))]
    with api.EchoVLMClient(address) as client, pytest.raises(api.OverloadedError, match="64 requests") as caught:
        client.generate(b"x")
    assert caught.value.retry_after_s == 2.5
    assert servicer.calls == 1, "an overloaded server must not be asked again at once"


def test_a_lost_organ_is_named(servicer: ScriptedEchoVLM, address: str) -> None:
    info = error_details_pb2.ErrorInfo(reason="EXPERTS_UNAVAILABLE", metadata={"organ": "liver"})
    servicer.failures = [status(CODES.UNAVAILABLE, "the experts of 'liver' are away", retry_info(1.0), info)] * 9
    with api.EchoVLMClient(address, retry=False) as client, pytest.raises(api.UnavailableError) as caught:
        client.generate(b"x")
    assert caught.value.organ == "liver"
    assert caught.value.retry_after_s == 1.0
    assert caught.value.reached


def test_no_server_is_told_from_a_lost_part() -> None:
    with serving(ScriptedEchoVLM()) as address:
        pass
    with (
        api.EchoVLMClient(address, retry=False) as client,
        pytest.raises(api.UnavailableError, match=address) as caught,
    ):
        client.model_info()
    assert not caught.value.reached
    assert caught.value.organ is None
    assert caught.value.retry_after_s is None


def test_damaged_details_do_not_hide_the_error() -> None:
    class Damaging(ScriptedEchoVLM):
        async def GetModelInfo(
            self, request: echovlm_pb2.GetModelInfoRequest, context: grpc.aio.ServicerContext
        ) -> echovlm_pb2.ModelInfo:
            context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"),))
            await context.abort(CODES.NOT_FOUND, "no such organ")
            raise AssertionError("abort raises")

    with (
        serving(Damaging()) as other,
        api.EchoVLMClient(other) as client,
        pytest.raises(api.NotFoundError, match="no such organ"),
    ):
        client.model_info()


def test_a_request_too_long_for_the_server_is_the_callers_error(servicer: ScriptedEchoVLM) -> None:
    with (
        serving(servicer, max_receive_bytes=1000) as address,
        api.EchoVLMClient(address) as client,
        pytest.raises(api.InvalidRequestError, match="too long for the server") as caught,
    ):
        client.generate(b"x" * 2000)
    assert [violation.field for violation in caught.value.violations] == ["images"]


def test_another_kind_of_server_is_named() -> None:
    from concurrent import futures

    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with api.EchoVLMClient(f"127.0.0.1:{port}") as client, pytest.raises(api.EchoVLMError, match="not an EchoVLM"):
            client.model_info()
    finally:
        server.stop(None)


async def test_the_async_client_reads_the_same_details(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.failures = [
        status(CODES.INVALID_ARGUMENT, "two fields are wrong", BAD_REQUEST),
        status(CODES.RESOURCE_EXHAUSTED, "full", retry_info(0.25)),
        status(CODES.NOT_FOUND, "no organ 'spleen'"),
    ]
    async with api.AsyncEchoVLMClient(address) as client:
        with pytest.raises(api.InvalidRequestError) as caught:
            await client.generate(b"x", request_id="abc")
        assert len(caught.value.violations) == 2
        assert caught.value.request_id == "abc"
        with pytest.raises(api.OverloadedError) as overloaded:
            [event async for event in client.stream(b"x")]
        assert overloaded.value.retry_after_s == 0.25
        with pytest.raises(api.NotFoundError, match="spleen"):
            await client.model_info()


@pytest.mark.parametrize("percent", ["12.5", "no number"])
def test_who_is_not_in_a_new_organs_canary_learns_its_part(
    servicer: ScriptedEchoVLM, address: str, percent: str
) -> None:
    info = error_details_pb2.ErrorInfo(reason="ORGAN_IN_CANARY", metadata={"organ": "lung", "percent": percent})
    servicer.failures = [status(CODES.FAILED_PRECONDITION, "'lung' is in canary", info)]
    with api.EchoVLMClient(address) as client, pytest.raises(api.FailedPreconditionError) as caught:
        client.generate(b"x")
    if percent == "12.5":
        assert isinstance(caught.value, api.OrganInCanaryError)
        assert (caught.value.organ, caught.value.percent) == ("lung", 12.5)
    assert servicer.calls == 1, "the same request is not chosen a moment later either"
