"""The errors of `serving.core.failures` in gRPC's form: a status with `google.rpc` details, and back.

Servicers raise exceptions. `serving.interceptor` converts them with `to_status`, and expert groups convert errors of
single calls in a stream.
"""

from collections.abc import Iterator

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from echovlm_ray.serving.core.failures import INTERNAL_TEXT, RETRY_AFTER_S, Failure, failure_of

DOMAIN = "echovlm.v1"
DETAILS_KEY = "grpc-status-details-bin"
LOST_TEXT = "a part of the system was lost during the call; sending the request again is safe"


def to_status(exception: BaseException) -> status_pb2.Status:
    """The gRPC status of an exception: code, text, and `google.rpc` details if the type has some."""
    failure = failure_of_call(exception) if isinstance(exception, grpc.aio.AioRpcError) else failure_of(exception)
    status = status_pb2.Status(code=failure.code, message=failure.text)
    for detail in _details(failure):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _details(failure: Failure) -> Iterator[Message]:
    if failure.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=failure.field, description=failure.description)
        yield error_details_pb2.BadRequest(field_violations=[violation])
    if failure.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(failure.retry_after_s * 1e9))
        yield error_details_pb2.RetryInfo(retry_delay=delay)
    if failure.reason:
        yield error_details_pb2.ErrorInfo(reason=failure.reason, domain=DOMAIN, metadata=failure.facts)


def failure_of_call(error: grpc.aio.AioRpcError) -> Failure:
    """The failure that a caller gets when a call between two parts of the system failed.

    A status that another part made with `to_status` is passed on. A status of gRPC itself is replaced: its texts name
    internal addresses.
    """
    said = said_by_part(error)
    if said is not None:
        return said
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return Failure(code_pb2.UNAVAILABLE, LOST_TEXT, retry_after_s=RETRY_AFTER_S, reason="PART_UNAVAILABLE")
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return Failure(code_pb2.DEADLINE_EXCEEDED, "the deadline passed before the answer was complete")
    return Failure(code_pb2.INTERNAL, INTERNAL_TEXT)


def said_by_part(error: grpc.aio.AioRpcError) -> Failure | None:
    """The status that the other part made with `to_status`; None if gRPC itself reports the failure."""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return _failure_from_proto(status_pb2.Status.FromString(value))
            except DecodeError:
                return None
    return None


def _failure_from_proto(status: status_pb2.Status) -> Failure:
    bad, retry, info = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo(), error_details_pb2.ErrorInfo()
    retry_after_s = None
    for detail in status.details:
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        elif not detail.Unpack(bad):
            detail.Unpack(info)
    violation = bad.field_violations[0] if bad.field_violations else bad.field_violations.add()
    return Failure(
        status.code,
        status.message,
        violation.field,
        violation.description,
        retry_after_s,
        info.reason,
        dict(info.metadata),
    )
