"""Maps exceptions to gRPC statuses; the only place that does.

Servicers raise; `serving.interceptor` calls `to_status` on what they raise, and the expert groups on what goes wrong
with one exchange inside a stream. A text that was written for the caller is passed on; any other exception is
`INTERNAL` and carries nothing but that, because its text may hold paths, addresses or a patient's data.
"""

from collections.abc import Callable, Sequence
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from echovlm_ray.errors import (
    DeadlineError,
    InvalidRequestError,
    MessageTooLargeError,
    OverloadedError,
    PartUnavailableError,
    PromptChangedError,
    ShuttingDownError,
    TextUnavailableError,
    UnauthenticatedError,
    UnknownServiceError,
)
from experts.errors import (
    BUNDLE_UNUSABLE,
    BundleNotResidentError,
    BundleUnusableError,
    ExpertCapacityError,
    InvalidBundleError,
    InvalidTensorError,
    RegistryAwayError,
    RegistryError,
    RegistryFullError,
    UnknownBundleError,
)
from router.errors import (
    ExpertSetNotServedError,
    ExpertsFailedError,
    ExpertsUnavailableError,
    ExpertsUnusableError,
    InvalidRolloutRequestError,
    OrganInCanaryError,
    OrganPendingError,
    ReplayRefusedError,
    RolloutDatabaseError,
    RolloutDatabaseFullError,
    RolloutDatabaseUnavailableError,
    RolloutStateError,
    TooManyOrgansError,
    UnknownExpertSetError,
    UnknownOrganError,
    UnknownRolloutError,
)

DOMAIN = "echovlm.v1"
DETAILS_KEY = "grpc-status-details-bin"
INTERNAL_TEXT = "an internal error occurred; the server's log names it under this request id"
# The reason in `ErrorInfo` of what a router answers until it knows an organ that was just added.
ORGAN_PENDING = "ORGAN_PENDING"
LOST_TEXT = "a part of the system was lost during the call; sending the request again is safe"
# The pause that a caller is asked for when nothing better is known.
RETRY_AFTER_S = 1.0
# An operator must make room first.
DISK_RETRY_AFTER_S = 60.0


def to_status(exception: BaseException) -> status_pb2.Status:
    """The status that a caller sees for an exception: code, text, and `google.rpc` details where the type has some."""
    if isinstance(exception, grpc.aio.AioRpcError):
        return _status_of_inner_call(exception)
    for kind, convert in _CONVERSIONS:
        if isinstance(exception, kind):
            return convert(exception)
    return status_pb2.Status(code=code_pb2.INTERNAL, message=INTERNAL_TEXT)


def _status(code: int, message: str, details: Sequence[Message] = ()) -> status_pb2.Status:
    status = status_pb2.Status(code=code, message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    delay = Duration()
    delay.FromNanoseconds(round(seconds * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _error_info(reason: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)


def _invalid_request(error: InvalidRequestError) -> status_pb2.Status:
    violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.description)
    return _status(code_pb2.INVALID_ARGUMENT, str(error), [error_details_pb2.BadRequest(field_violations=[violation])])


def _too_many_organs(error: TooManyOrgansError) -> status_pb2.Status:
    return _invalid_request(InvalidRequestError("organs", str(error)))


def _invalid_rollout_request(error: InvalidRolloutRequestError) -> status_pb2.Status:
    return _invalid_request(InvalidRequestError(error.field, error.description))


def _experts_unavailable(error: ExpertsUnavailableError) -> status_pb2.Status:
    # The reason names addresses inside the system; it belongs into the log.
    text = f"the experts of {error.organ!r} are not available now; sending the request again is safe"
    details = [_retry_info(error.retry_after_s), _error_info("EXPERTS_UNAVAILABLE", organ=error.organ)]
    return _status(code_pb2.UNAVAILABLE, text, details)


def _bundle_unusable(error: BundleUnusableError) -> status_pb2.Status:
    details = [_error_info(BUNDLE_UNUSABLE, organ=error.organ, why=error.reason)]
    return _status(code_pb2.FAILED_PRECONDITION, str(error), details)


def _experts_unusable(error: ExpertsUnusableError) -> status_pb2.Status:
    version = error.version or f"{error.digest[:12]}…"
    text = (
        f"the experts of {error.organ!r} cannot answer: no replica could load version {version}, because "
        f"{error.reason}. Sending the request again does not help until an operator has mended it; "
        "`echoray status` says more"
    )
    details = [_error_info("EXPERTS_UNUSABLE", organ=error.organ, version=version, why=error.reason)]
    return _status(code_pb2.FAILED_PRECONDITION, text, details)


def _experts_failed(error: ExpertsFailedError) -> status_pb2.Status:
    text = f"the experts of {error.organ!r} could not compute the request; {INTERNAL_TEXT}"
    return _status(code_pb2.INTERNAL, text, [_error_info("EXPERTS_FAILED", organ=error.organ)])


def _organ_pending(error: OrganPendingError) -> status_pb2.Status:
    return _status(code_pb2.UNAVAILABLE, str(error), [_retry_info(error.retry_after_s), _error_info(ORGAN_PENDING)])


def _organ_in_canary(error: OrganInCanaryError) -> status_pb2.Status:
    details = [_error_info("ORGAN_IN_CANARY", organ=error.organ, percent=f"{error.percent:g}")]
    return _status(code_pb2.FAILED_PRECONDITION, str(error), details)


def _expert_set_not_served(error: ExpertSetNotServedError) -> status_pb2.Status:
    return _status(code_pb2.FAILED_PRECONDITION, str(error), [_error_info("EXPERT_SET_NOT_SERVED")])


def _replay_refused(error: ReplayRefusedError) -> status_pb2.Status:
    details = [_error_info("REPLAY_REFUSED", organ=error.organ, version=error.version, why=error.reason)]
    return _status(code_pb2.FAILED_PRECONDITION, str(error), details)


def _prompt_changed(error: PromptChangedError) -> status_pb2.Status:
    return _status(code_pb2.FAILED_PRECONDITION, str(error), [_error_info("PROMPT_CHANGED")])


def _part_unavailable(error: PartUnavailableError) -> status_pb2.Status:
    details = [_retry_info(error.retry_after_s), _error_info("PART_UNAVAILABLE", part=error.part)]
    return _status(code_pb2.UNAVAILABLE, str(error), details)


def _overloaded(error: OverloadedError) -> status_pb2.Status:
    return _status(code_pb2.RESOURCE_EXHAUSTED, str(error), [_retry_info(error.retry_after_s)])


def _shutting_down(error: ShuttingDownError) -> status_pb2.Status:
    return _status(code_pb2.UNAVAILABLE, str(error), [_retry_info(RETRY_AFTER_S), _error_info("SHUTTING_DOWN")])


def _disk_full(error: Exception) -> status_pb2.Status:
    details = [_retry_info(DISK_RETRY_AFTER_S), _error_info("DISK_FULL")]
    return _status(code_pb2.RESOURCE_EXHAUSTED, str(error), details)


def _unavailable(reason: str) -> Callable[[BaseException], status_pb2.Status]:
    return lambda error: _status(code_pb2.UNAVAILABLE, str(error), [_retry_info(RETRY_AFTER_S), _error_info(reason)])


def _plain(code: int) -> Callable[[BaseException], status_pb2.Status]:
    return lambda error: _status(code, str(error))


def _status_of_inner_call(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """The status of a call that one part made to another.

    A status that the other part made with `to_status` is passed on as it is. Whatever gRPC itself says is replaced:
    its texts name internal addresses.
    """
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return _status(code_pb2.UNAVAILABLE, LOST_TEXT, [_retry_info(RETRY_AFTER_S), _error_info("PART_UNAVAILABLE")])
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return _status(code_pb2.DEADLINE_EXCEEDED, "the deadline passed before the answer was complete")
    return _status(code_pb2.INTERNAL, INTERNAL_TEXT)


# Asked from top to bottom; the first type that fits decides.
_CONVERSIONS: tuple[tuple[type[BaseException], Callable[[Any], status_pb2.Status]], ...] = (
    (InvalidRequestError, _invalid_request),
    (MessageTooLargeError, _plain(code_pb2.RESOURCE_EXHAUSTED)),
    (InvalidTensorError, _plain(code_pb2.INVALID_ARGUMENT)),
    (TooManyOrgansError, _too_many_organs),
    (UnknownOrganError, _plain(code_pb2.NOT_FOUND)),
    (UnknownServiceError, _plain(code_pb2.NOT_FOUND)),
    (OrganPendingError, _organ_pending),
    (OrganInCanaryError, _organ_in_canary),
    (UnknownExpertSetError, _plain(code_pb2.NOT_FOUND)),
    (ExpertSetNotServedError, _expert_set_not_served),
    (ReplayRefusedError, _replay_refused),
    (PromptChangedError, _prompt_changed),
    (UnknownBundleError, _plain(code_pb2.NOT_FOUND)),
    (UnknownRolloutError, _plain(code_pb2.NOT_FOUND)),
    (RolloutStateError, _plain(code_pb2.FAILED_PRECONDITION)),
    (InvalidRolloutRequestError, _invalid_rollout_request),
    (RolloutDatabaseUnavailableError, _unavailable("DATABASE_UNAVAILABLE")),
    (RolloutDatabaseFullError, _disk_full),
    (RolloutDatabaseError, _plain(code_pb2.FAILED_PRECONDITION)),
    (BundleUnusableError, _bundle_unusable),
    (BundleNotResidentError, _plain(code_pb2.FAILED_PRECONDITION)),
    (InvalidBundleError, _plain(code_pb2.FAILED_PRECONDITION)),
    (RegistryFullError, _disk_full),
    (RegistryError, _plain(code_pb2.FAILED_PRECONDITION)),
    # Not UNAVAILABLE: the part that was called is there, and its callers would take it for lost.
    (RegistryAwayError, _plain(code_pb2.FAILED_PRECONDITION)),
    (ExpertCapacityError, lambda error: _status(code_pb2.RESOURCE_EXHAUSTED, str(error), [_retry_info(RETRY_AFTER_S)])),
    (OverloadedError, _overloaded),
    (ExpertsUnusableError, _experts_unusable),
    (ExpertsUnavailableError, _experts_unavailable),
    (ExpertsFailedError, _experts_failed),
    (PartUnavailableError, _part_unavailable),
    (ShuttingDownError, _shutting_down),
    (DeadlineError, _plain(code_pb2.DEADLINE_EXCEEDED)),
    (TextUnavailableError, _plain(code_pb2.FAILED_PRECONDITION)),
    (UnauthenticatedError, _plain(code_pb2.UNAUTHENTICATED)),
)
