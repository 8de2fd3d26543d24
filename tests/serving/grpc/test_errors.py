from typing import TypeVar

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from echovlm_ray import errors as own_errors
from echovlm_ray.errors import DeadlineError, InvalidRequestError, OverloadedError, PartUnavailableError
from echovlm_ray.serving.core.failures import INTERNAL_TEXT
from echovlm_ray.serving.grpc.errors import to_status
from experts import errors as expert_errors
from router import errors as router_errors
from router.errors import (
    ExpertsFailedError,
    ExpertsUnavailableError,
    ExpertsUnusableError,
    TooManyOrgansError,
    UnknownOrganError,
)

T = TypeVar("T", bound=Message)


def detail(status: status_pb2.Status, kind: type[T]) -> T:
    for packed in status.details:
        found = kind()
        if packed.Unpack(found):
            return found
    raise AssertionError(f"no {kind.__name__} in {status}")


def inner_error(code: grpc.StatusCode, text: str, *trailing: tuple[str, bytes]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details=text)


def test_an_invalid_request_names_its_field() -> None:
    status = to_status(InvalidRequestError("images[1].content", "is no image"))
    assert status.code == code_pb2.INVALID_ARGUMENT
    (violation,) = detail(status, error_details_pb2.BadRequest).field_violations
    assert (violation.field, violation.description) == ("images[1].content", "is no image")


def test_too_many_organs_are_a_violation_of_the_organs_field() -> None:
    status = to_status(TooManyOrgansError("3 organs are named"))
    assert status.code == code_pb2.INVALID_ARGUMENT
    assert detail(status, error_details_pb2.BadRequest).field_violations[0].field == "organs"


def test_an_invalid_rollout_request_names_its_field() -> None:
    status = to_status(router_errors.InvalidRolloutRequestError("percent", "300 is above 100"))
    assert status.code == code_pb2.INVALID_ARGUMENT
    (violation,) = detail(status, error_details_pb2.BadRequest).field_violations
    assert (violation.field, violation.description) == ("percent", "300 is above 100")


def test_load_says_when_to_come_back() -> None:
    status = to_status(OverloadedError("the queue holds 128 requests (router.max_queue)", retry_after_s=2.5))
    assert status.code == code_pb2.RESOURCE_EXHAUSTED
    assert "router.max_queue" in status.message
    assert detail(status, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 2500


def test_lost_experts_name_the_organ_and_no_address() -> None:
    status = to_status(ExpertsUnavailableError("heart", "127.0.0.1:4711: connection refused", retry_after_s=0.5))
    assert status.code == code_pb2.UNAVAILABLE
    info = detail(status, error_details_pb2.ErrorInfo)
    assert (info.reason, dict(info.metadata)) == ("EXPERTS_UNAVAILABLE", {"organ": "heart"})
    assert detail(status, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 500
    assert "heart" in status.message
    assert "127.0.0.1" not in status.message


def test_experts_that_cannot_be_loaded_name_organ_version_and_reason() -> None:
    status = to_status(ExpertsUnusableError("heart", "d" * 64, "the registry does not have the bundle", "2.1.0"))
    assert status.code == code_pb2.FAILED_PRECONDITION
    assert all(text in status.message for text in ("'heart'", "2.1.0", "the registry does not have the bundle"))
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    assert info.reason == "EXPERTS_UNUSABLE"
    assert dict(info.metadata) == {
        "organ": "heart",
        "version": "2.1.0",
        "why": "the registry does not have the bundle",
    }


def test_failed_experts_name_the_organ_and_no_reason() -> None:
    status = to_status(ExpertsFailedError("heart", "secret detail"))
    assert status.code == code_pb2.INTERNAL
    assert detail(status, error_details_pb2.ErrorInfo).metadata["organ"] == "heart"
    assert "secret" not in status.message


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnknownOrganError("there is no organ 'spleen'"), code_pb2.NOT_FOUND),
        (router_errors.OrganPendingError(), code_pb2.UNAVAILABLE),
        (router_errors.OrganInCanaryError("lung", 5.0), code_pb2.FAILED_PRECONDITION),
        (expert_errors.UnknownBundleError("no bundle"), code_pb2.NOT_FOUND),
        (router_errors.UnknownRolloutError("no rollout"), code_pb2.NOT_FOUND),
        (router_errors.RolloutStateError("it is staged; possible: rollback"), code_pb2.FAILED_PRECONDITION),
        (router_errors.RolloutDatabaseError("a newer version wrote it"), code_pb2.FAILED_PRECONDITION),
        (router_errors.RolloutDatabaseUnavailableError("locked by process 7"), code_pb2.UNAVAILABLE),
        (router_errors.RolloutDatabaseFullError("the disk is full"), code_pb2.RESOURCE_EXHAUSTED),
        (expert_errors.RegistryFullError("the disk is full"), code_pb2.RESOURCE_EXHAUSTED),
        (expert_errors.RegistryError("cannot be read"), code_pb2.FAILED_PRECONDITION),
        (expert_errors.BundleNotResidentError("not loaded"), code_pb2.FAILED_PRECONDITION),
        (expert_errors.InvalidBundleError("damaged"), code_pb2.FAILED_PRECONDITION),
        (expert_errors.InvalidTensorError("hidden_states has 3 bytes"), code_pb2.INVALID_ARGUMENT),
        (expert_errors.ExpertCapacityError("max_queue"), code_pb2.RESOURCE_EXHAUSTED),
        (PartUnavailableError("the router", "no replica is running"), code_pb2.UNAVAILABLE),
        (own_errors.ShuttingDownError("the router is shutting down"), code_pb2.UNAVAILABLE),
        (DeadlineError("the deadline passed"), code_pb2.DEADLINE_EXCEEDED),
        (own_errors.UnauthenticatedError("no token"), code_pb2.UNAUTHENTICATED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_typed_error_has_its_code_and_keeps_its_text(error: Exception, code: int) -> None:
    status = to_status(error)
    assert status.code == code
    assert str(error) in status.message


def test_no_typed_error_was_forgotten() -> None:
    arguments = {
        "InvalidRequestError": ("field", "text"),
        "InvalidRolloutRequestError": ("field", "text"),
        "PartUnavailableError": ("part", "text"),
        "BundleUnusableError": ("organ", "digest", "text"),
        "ExpertsUnavailableError": ("organ", "text"),
        "ExpertsUnusableError": ("organ", "digest", "text"),
        "ExpertsFailedError": ("organ", "text"),
        "OrganInCanaryError": ("organ", 5.0),
        "OrganPendingError": (0.5,),
        "PromptChangedError": (),
        "ReplayRefusedError": ("organ", "1.0.0", "text"),
    }
    for module in (own_errors, expert_errors, router_errors):
        for name, kind in vars(module).items():
            if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__ == module.__name__:
                status = to_status(kind(*arguments.get(name, ("text",))))
                assert status.message != INTERNAL_TEXT, f"{name} is not mapped"


UNEXPECTED = [ValueError("Jane Doe"), KeyError("/home/x"), RuntimeError("127.0.0.1:4711"), OSError(5)]


@pytest.mark.parametrize("error", UNEXPECTED, ids=repr)
def test_anything_else_is_internal_and_says_nothing(error: Exception) -> None:
    status = to_status(error)
    assert (status.code, status.message) == (code_pb2.INTERNAL, INTERNAL_TEXT)
    assert not status.details


def test_the_status_of_another_part_is_passed_on() -> None:
    original = to_status(ExpertsUnavailableError("liver", "gone"))
    details = ("grpc-status-details-bin", original.SerializeToString())
    inner = inner_error(grpc.StatusCode.UNAVAILABLE, original.message, details)
    assert to_status(inner) == original
    # And a caller can read it.
    assert rpc_status.to_status(to_status(inner)).code == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, code_pb2.UNAVAILABLE),
        (grpc.StatusCode.CANCELLED, code_pb2.UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, code_pb2.DEADLINE_EXCEEDED),
        (grpc.StatusCode.UNKNOWN, code_pb2.INTERNAL),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, code_pb2.INTERNAL),
    ],
    ids=str,
)
def test_what_grpc_itself_says_of_an_inner_call_stays_inside(code: grpc.StatusCode, expected: int) -> None:
    status = to_status(inner_error(code, "failed to connect to ipv4:127.0.0.1:4711"))
    assert status.code == expected
    assert "4711" not in status.message


def test_damaged_details_of_an_inner_call_are_not_passed_on() -> None:
    inner = inner_error(grpc.StatusCode.UNKNOWN, "x", ("grpc-status-details-bin", b"\xff\xff\xff"))
    assert to_status(inner).code == code_pb2.INTERNAL
