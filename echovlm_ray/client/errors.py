"""The errors of a call as exception types, read from the `google.rpc` details."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

Detail = TypeVar("Detail", bound=Message)
DETAILS_KEY = "grpc-status-details-bin"
# gRPC, not the service, refuses a message that is too long, and has no separate code for it.
TOO_LONG = "essage larger than max"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One invalid field of a request, for example "images[1].content", and the problem."""

    field: str
    description: str

    def __str__(self) -> str:
        """`field: description`."""
        return f"{self.field}: {self.description}" if self.field else self.description


class EchoVLMError(RuntimeError):
    """Base of all errors of a call.

    Attributes:
        code: the gRPC status, or None when the request never left this process.
        request_id: the id of the call in the server's log.
    """

    def __init__(self, message: str, *, code: grpc.StatusCode | None = None, request_id: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.request_id = request_id


class InvalidRequestError(EchoVLMError, ValueError):
    """The request is invalid. A retry does not help.

    Attributes:
        violations: the invalid fields, named as in `GenerateRequest` in protos/echovlm.proto.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        request_id: str = "",
        violations: Sequence[FieldViolation] = (),
    ) -> None:
        super().__init__(message, code=code, request_id=request_id)
        self.violations = tuple(violations)


class UnauthenticatedError(EchoVLMError):
    """The server requires a token, or does not accept this one."""


class PermissionDeniedError(EchoVLMError):
    """The caller is authenticated but not allowed to do this."""


class NotFoundError(EchoVLMError, LookupError):
    """There is no such organ or version. The text lists the existing ones."""


class FailedPreconditionError(EchoVLMError):
    """The system's state does not allow the call."""


class OrganInCanaryError(FailedPreconditionError):
    """The organ is new and still a canary, and the request is not in the canary's share.

    Attributes:
        organ: the organ.
        percent: the canary's share of the requests.
    """

    def __init__(
        self, message: str, *, code: grpc.StatusCode | None = None, request_id: str = "", organ: str, percent: float
    ) -> None:
        """Names the organ and the canary's share of the requests."""
        super().__init__(message, code=code, request_id=request_id)
        self.organ = organ
        self.percent = percent


class OverloadedError(EchoVLMError):
    """A queue of the server is full. Retry after `retry_after_s` seconds (None: unknown)."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        request_id: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, code=code, request_id=request_id)
        self.retry_after_s = retry_after_s


class UnavailableError(EchoVLMError):
    """The server, or a part of it, does not answer now. A retry is safe.

    Attributes:
        organ: the organ whose experts are unavailable, or None for another part or the whole server.
        retry_after_s: seconds before a retry; None if unknown.
        reached: whether the server answered. False if nothing listens, or the connection was lost.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        request_id: str = "",
        organ: str | None = None,
        retry_after_s: float | None = None,
        reached: bool = False,
    ) -> None:
        super().__init__(message, code=code, request_id=request_id)
        self.organ = organ
        self.retry_after_s = retry_after_s
        self.reached = reached


class DeadlineExceededError(EchoVLMError, TimeoutError):
    """The answer was not complete before the deadline. The server has cancelled the request."""


class CallCancelledError(EchoVLMError):
    """The call was cancelled, here or by the server."""


class InternalServerError(EchoVLMError):
    """An internal error of the server. See its log under `request_id`."""


PLAIN_TYPES: dict[grpc.StatusCode, type[EchoVLMError]] = {
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CallCancelledError,
    grpc.StatusCode.INTERNAL: InternalServerError,
    grpc.StatusCode.UNKNOWN: InternalServerError,
    grpc.StatusCode.DATA_LOSS: InternalServerError,
}


def from_rpc_error(
    error: grpc.RpcError, address: str, request_id: str, *, service: str = "an EchoVLM gateway"
) -> EchoVLMError:
    """The typed error of a failed call, of `grpc` or of `grpc.aio`.

    Args:
        error: gRPC's error.
        address: the server's address, for the text.
        request_id: the call's id.
        service: the service that should be at that address.
    """
    code: grpc.StatusCode = error.code()
    text = error.details() or code.name
    details = _details(error)
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequestError(text, code=code, request_id=request_id, violations=_violations(details))
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        if TOO_LONG in text:
            violation = FieldViolation("images", f"the request is too long for the server ({text}): send less at once")
            return InvalidRequestError(str(violation), code=code, request_id=request_id, violations=[violation])
        return OverloadedError(text, code=code, request_id=request_id, retry_after_s=_retry_after(details))
    if code == grpc.StatusCode.UNAVAILABLE:
        # The service always sends a retry delay. Without one the connection failed.
        reached = _find(details, error_details_pb2.RetryInfo) is not None
        return UnavailableError(
            text if reached else f"the connection to {address} failed: {text}",
            code=code,
            request_id=request_id,
            organ=_organ(details),
            retry_after_s=_retry_after(details),
            reached=reached,
        )
    if code == grpc.StatusCode.FAILED_PRECONDITION and (canary := _canary(details)) is not None:
        organ, percent = canary
        return OrganInCanaryError(text, code=code, request_id=request_id, organ=organ, percent=percent)
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return EchoVLMError(f"{address} is not {service}: {text}", code=code, request_id=request_id)
    return PLAIN_TYPES.get(code, EchoVLMError)(text, code=code, request_id=request_id)


def _details(error: grpc.RpcError) -> status_pb2.Status:
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                # The code and the text still say what happened.
                break
    return status_pb2.Status()


def _find(details: status_pb2.Status, kind: type[Detail]) -> Detail | None:
    for detail in details.details:
        if detail.Is(kind.DESCRIPTOR):
            message = kind()
            detail.Unpack(message)
            return message
    return None


def _violations(details: status_pb2.Status) -> list[FieldViolation]:
    found = _find(details, error_details_pb2.BadRequest)
    return [FieldViolation(item.field, item.description) for item in found.field_violations] if found else []


def _retry_after(details: status_pb2.Status) -> float | None:
    found = _find(details, error_details_pb2.RetryInfo)
    return found.retry_delay.ToNanoseconds() / 1e9 if found else None


def _canary(details: status_pb2.Status) -> tuple[str, float] | None:
    found = _find(details, error_details_pb2.ErrorInfo)
    if found is None or found.reason != "ORGAN_IN_CANARY":
        return None
    try:
        return found.metadata.get("organ", ""), float(found.metadata.get("percent", ""))
    except ValueError:
        return None


def _organ(details: status_pb2.Status) -> str | None:
    found = _find(details, error_details_pb2.ErrorInfo)
    return found.metadata.get("organ") or None if found else None
