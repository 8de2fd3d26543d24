"""The catalogue of errors: the one place that says what a caller is told about an exception, whatever the transport.

Parts raise; a transport calls `failure_of` on what they raise and writes the failure in its own form
(`serving.errors` for gRPC). A text that was written for the caller is passed on; any other exception is `INTERNAL` and
carries nothing but that, for its text may hold paths, addresses or a patient's data.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import field as with_default
from typing import Any

from google.rpc import code_pb2

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

_Convert = Callable[[Any], "Failure"]

INTERNAL_TEXT = "an internal error occurred; the server's log names it under this request id"
# The reasons that a gateway itself acts on: an organ that was just added, and a replica that ends.
ORGAN_PENDING = "ORGAN_PENDING"
SHUTTING_DOWN = "SHUTTING_DOWN"
# The pause that a caller is asked for when nothing better is known.
RETRY_AFTER_S = 1.0
# An operator must make room first.
DISK_RETRY_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class Failure:
    """What a caller is told about an error.

    Attributes:
        code: of `google.rpc.Code`, which names the status of gRPC and says that of HTTP.
        text: for people.
        field: of the request, where it is at fault; otherwise "".
        description: what is wrong with the field.
        retry_after_s: when the request may be sent again; None where that does not help, or is not known to.
        reason: the kind of the error, for programs; "" where the code says all.
        facts: what belongs to the reason, such as the organ.
    """

    code: int
    text: str
    field: str = ""
    description: str = ""
    retry_after_s: float | None = None
    reason: str = ""
    facts: Mapping[str, str] = with_default(default_factory=dict)


class PartRefusedError(RuntimeError):
    """A part of the system that was called refused the request, or failed. Carries what it said."""

    def __init__(self, failure: Failure) -> None:
        """Takes what the part said, or what is said in its place."""
        super().__init__(failure.text)
        self.failure = failure


def failure_of(exception: BaseException) -> Failure:
    """What a caller is told about an exception."""
    for kind, convert in _CATALOGUE:
        if isinstance(exception, kind):
            return convert(exception)
    return Failure(code_pb2.INTERNAL, INTERNAL_TEXT)


def _violation(name: str, description: str) -> Failure:
    return Failure(code_pb2.INVALID_ARGUMENT, f"{name}: {description}", name, description)


def _plain(code: int) -> _Convert:
    return lambda error: Failure(code, str(error))


def _later(code: int, reason: str = "", after_s: float | None = None) -> _Convert:
    """Of what another try may change; after as long as the error says where `after_s` does not."""
    return lambda error: Failure(
        code, str(error), retry_after_s=error.retry_after_s if after_s is None else after_s, reason=reason
    )


def _refused(reason: str, facts: Callable[[Any], Mapping[str, str]] = lambda error: {}) -> _Convert:
    """Of what another try does not change."""
    return lambda error: Failure(code_pb2.FAILED_PRECONDITION, str(error), reason=reason, facts=facts(error))


def _experts_unavailable(error: ExpertsUnavailableError) -> Failure:
    # The reason names addresses inside the system; it belongs into the log.
    text = f"the experts of {error.organ!r} are not available now; sending the request again is safe"
    return Failure(
        code_pb2.UNAVAILABLE,
        text,
        retry_after_s=error.retry_after_s,
        reason="EXPERTS_UNAVAILABLE",
        facts={"organ": error.organ},
    )


def _experts_unusable(error: ExpertsUnusableError) -> Failure:
    version = error.version or f"{error.digest[:12]}…"
    text = (
        f"the experts of {error.organ!r} cannot answer: no replica could load version {version}, because "
        f"{error.reason}. Sending the request again does not help until an operator has mended it; "
        "`echoray status` says more"
    )
    facts = {"organ": error.organ, "version": version, "why": error.reason}
    return Failure(code_pb2.FAILED_PRECONDITION, text, reason="EXPERTS_UNUSABLE", facts=facts)


def _experts_failed(error: ExpertsFailedError) -> Failure:
    text = f"the experts of {error.organ!r} could not compute the request; {INTERNAL_TEXT}"
    return Failure(code_pb2.INTERNAL, text, reason="EXPERTS_FAILED", facts={"organ": error.organ})


def _part_unavailable(error: PartUnavailableError) -> Failure:
    return Failure(
        code_pb2.UNAVAILABLE,
        str(error),
        retry_after_s=error.retry_after_s,
        reason="PART_UNAVAILABLE",
        facts={"part": error.part},
    )


def _canary(error: OrganInCanaryError) -> Mapping[str, str]:
    return {"organ": error.organ, "percent": f"{error.percent:g}"}


def _replay(error: ReplayRefusedError) -> Mapping[str, str]:
    return {"organ": error.organ, "version": error.version, "why": error.reason}


def _bundle(error: BundleUnusableError) -> Mapping[str, str]:
    return {"organ": error.organ, "why": error.reason}


_INVALID, _MISSING = code_pb2.INVALID_ARGUMENT, code_pb2.NOT_FOUND
_UNAVAILABLE, _EXHAUSTED, _STATE = code_pb2.UNAVAILABLE, code_pb2.RESOURCE_EXHAUSTED, code_pb2.FAILED_PRECONDITION
# Asked from top to bottom; the first type that fits decides.
_CATALOGUE: tuple[tuple[type[BaseException], _Convert], ...] = (
    (PartRefusedError, lambda error: error.failure),
    (InvalidRequestError, lambda error: _violation(error.field, error.description)),
    (MessageTooLargeError, _plain(_EXHAUSTED)),
    (InvalidTensorError, _plain(_INVALID)),
    (TooManyOrgansError, lambda error: _violation("organs", str(error))),
    (UnknownOrganError, _plain(_MISSING)),
    (UnknownServiceError, _plain(_MISSING)),
    (OrganPendingError, _later(_UNAVAILABLE, ORGAN_PENDING)),
    (OrganInCanaryError, _refused("ORGAN_IN_CANARY", _canary)),
    (UnknownExpertSetError, _plain(_MISSING)),
    (ExpertSetNotServedError, _refused("EXPERT_SET_NOT_SERVED")),
    (ReplayRefusedError, _refused("REPLAY_REFUSED", _replay)),
    (PromptChangedError, _refused("PROMPT_CHANGED")),
    (UnknownBundleError, _plain(_MISSING)),
    (UnknownRolloutError, _plain(_MISSING)),
    (RolloutStateError, _plain(_STATE)),
    (InvalidRolloutRequestError, lambda error: _violation(error.field, error.description)),
    (RolloutDatabaseUnavailableError, _later(_UNAVAILABLE, "DATABASE_UNAVAILABLE", RETRY_AFTER_S)),
    (RolloutDatabaseFullError, _later(_EXHAUSTED, "DISK_FULL", DISK_RETRY_AFTER_S)),
    (RolloutDatabaseError, _plain(_STATE)),
    (BundleUnusableError, _refused(BUNDLE_UNUSABLE, _bundle)),
    (BundleNotResidentError, _plain(_STATE)),
    (InvalidBundleError, _plain(_STATE)),
    (RegistryFullError, _later(_EXHAUSTED, "DISK_FULL", DISK_RETRY_AFTER_S)),
    (RegistryError, _plain(_STATE)),
    # Not UNAVAILABLE: the part that was called is there, and its callers would take it for lost.
    (RegistryAwayError, _plain(_STATE)),
    (ExpertCapacityError, _later(_EXHAUSTED, after_s=RETRY_AFTER_S)),
    (OverloadedError, _later(_EXHAUSTED)),
    (ExpertsUnusableError, _experts_unusable),
    (ExpertsUnavailableError, _experts_unavailable),
    (ExpertsFailedError, _experts_failed),
    (PartUnavailableError, _part_unavailable),
    (ShuttingDownError, _later(_UNAVAILABLE, SHUTTING_DOWN, RETRY_AFTER_S)),
    (DeadlineError, _plain(code_pb2.DEADLINE_EXCEEDED)),
    (TextUnavailableError, _plain(_STATE)),
    (UnauthenticatedError, _plain(code_pb2.UNAUTHENTICATED)),
)
