"""The catalogue of errors: maps each exception to the failure for the caller, for all transports.

A transport calls `failure_of` with the exception of a part and writes the failure in its own format
(`serving.grpc.errors` for gRPC). Texts that were written for callers are passed on. Any other exception becomes
`INTERNAL` without details, because its text may contain paths, addresses or a patient's data.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import field as with_default
from operator import attrgetter
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
    RegistryError,
    RegistryFullError,
    RegistryUnavailableError,
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
# The reasons that the gateway handles: an organ that was just added, and a replica that shuts down.
ORGAN_PENDING = "ORGAN_PENDING"
SHUTTING_DOWN = "SHUTTING_DOWN"
# The default delay before a retry.
RETRY_AFTER_S = 1.0
# An operator must free space first.
DISK_RETRY_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class Failure:
    """The code, text and details that a caller gets for an error.

    Attributes:
        code: a `google.rpc.Code`, which determines the status of gRPC and of HTTP.
        text: for people.
        field: the invalid field of the request, or "".
        description: the problem of the field.
        retry_after_s: the delay before a retry; None if a retry does not help.
        reason: the kind of the error, for programs; "" if the code is sufficient.
        facts: details of the reason, such as the organ.
    """

    code: int
    text: str
    field: str = ""
    description: str = ""
    retry_after_s: float | None = None
    reason: str = ""
    facts: Mapping[str, str] = with_default(default_factory=dict)


class PartRefusedError(RuntimeError):
    """A part of the system refused the request, or failed. Has the part's failure."""

    def __init__(self, failure: Failure) -> None:
        """Takes the failure for the caller."""
        super().__init__(failure.text)
        self.failure = failure


def failure_of(exception: BaseException) -> Failure:
    """The failure for an exception."""
    for kind, convert in _CATALOGUE:
        if isinstance(exception, kind):
            return convert(exception)
    return Failure(code_pb2.INTERNAL, INTERNAL_TEXT)


def _violation(name: str, description: str) -> Failure:
    return Failure(code_pb2.INVALID_ARGUMENT, f"{name}: {description}", name, description)


def _never(error: Any) -> None:
    return None


def _soon(error: Any) -> float:
    return RETRY_AFTER_S


def _after_a_while(error: Any) -> float:
    return DISK_RETRY_AFTER_S


def _as(
    code: int,
    reason: str = "",
    *,
    retry: Callable[[Any], float | None] = _never,
    facts: Callable[[Any], Mapping[str, str]] = lambda error: {},
    text: Callable[[Any], str] = str,
) -> _Convert:
    return lambda error: Failure(code, text(error), retry_after_s=retry(error), reason=reason, facts=facts(error))


def _facts(*names: str, **renamed: str) -> Callable[[Any], Mapping[str, str]]:
    """The error's attributes with these names."""
    attributes = {name: name for name in names} | renamed
    return lambda error: {name: getattr(error, attribute) for name, attribute in attributes.items()}


def _experts_unavailable(error: ExpertsUnavailableError) -> str:
    # The reason contains internal addresses, so it is only logged.
    return f"the experts of {error.organ!r} are not available now; sending the request again is safe"


def _unusable_facts(error: ExpertsUnusableError) -> Mapping[str, str]:
    return {"organ": error.organ, "version": error.version or f"{error.digest[:12]}…", "why": error.reason}


def _experts_unusable(error: ExpertsUnusableError) -> str:
    version = _unusable_facts(error)["version"]
    return (
        f"the experts of {error.organ!r} cannot answer: no replica could load version {version}, because "
        f"{error.reason}. Sending the request again does not help until an operator has mended it; "
        "`echoray status` says more"
    )


def _experts_failed(error: ExpertsFailedError) -> str:
    return f"the experts of {error.organ!r} could not compute the request; {INTERNAL_TEXT}"


_as_said = attrgetter("retry_after_s")
_INVALID, _MISSING = code_pb2.INVALID_ARGUMENT, code_pb2.NOT_FOUND
_UNAVAILABLE, _EXHAUSTED, _STATE = code_pb2.UNAVAILABLE, code_pb2.RESOURCE_EXHAUSTED, code_pb2.FAILED_PRECONDITION

# The first type that matches decides.
_CATALOGUE: tuple[tuple[type[BaseException], _Convert], ...] = (
    (PartRefusedError, lambda error: error.failure),
    (InvalidRequestError, lambda error: _violation(error.field, error.description)),
    (MessageTooLargeError, _as(_EXHAUSTED)),
    (InvalidTensorError, _as(_INVALID)),
    (TooManyOrgansError, lambda error: _violation("organs", str(error))),
    (UnknownOrganError, _as(_MISSING)),
    (UnknownServiceError, _as(_MISSING)),
    (OrganPendingError, _as(_UNAVAILABLE, ORGAN_PENDING, retry=_as_said)),
    (
        OrganInCanaryError,
        _as(_STATE, "ORGAN_IN_CANARY", facts=lambda error: {"organ": error.organ, "percent": f"{error.percent:g}"}),
    ),
    (UnknownExpertSetError, _as(_MISSING)),
    (ExpertSetNotServedError, _as(_STATE, "EXPERT_SET_NOT_SERVED")),
    (ReplayRefusedError, _as(_STATE, "REPLAY_REFUSED", facts=_facts("organ", "version", why="reason"))),
    (PromptChangedError, _as(_STATE, "PROMPT_CHANGED")),
    (UnknownBundleError, _as(_MISSING)),
    (UnknownRolloutError, _as(_MISSING)),
    (RolloutStateError, _as(_STATE)),
    (InvalidRolloutRequestError, lambda error: _violation(error.field, error.description)),
    (RolloutDatabaseUnavailableError, _as(_UNAVAILABLE, "DATABASE_UNAVAILABLE", retry=_soon)),
    (RolloutDatabaseFullError, _as(_EXHAUSTED, "DISK_FULL", retry=_after_a_while)),
    (RolloutDatabaseError, _as(_STATE)),
    (BundleUnusableError, _as(_STATE, BUNDLE_UNUSABLE, facts=_facts("organ", why="reason"))),
    (BundleNotResidentError, _as(_STATE)),
    (InvalidBundleError, _as(_STATE)),
    (RegistryFullError, _as(_EXHAUSTED, "DISK_FULL", retry=_after_a_while)),
    (RegistryError, _as(_STATE)),
    # Not UNAVAILABLE, because callers would take the part for lost although it answers.
    (RegistryUnavailableError, _as(_STATE)),
    (ExpertCapacityError, _as(_EXHAUSTED, retry=_soon)),
    (OverloadedError, _as(_EXHAUSTED, retry=_as_said)),
    (ExpertsUnusableError, _as(_STATE, "EXPERTS_UNUSABLE", facts=_unusable_facts, text=_experts_unusable)),
    (
        ExpertsUnavailableError,
        _as(_UNAVAILABLE, "EXPERTS_UNAVAILABLE", retry=_as_said, facts=_facts("organ"), text=_experts_unavailable),
    ),
    (ExpertsFailedError, _as(code_pb2.INTERNAL, "EXPERTS_FAILED", facts=_facts("organ"), text=_experts_failed)),
    (PartUnavailableError, _as(_UNAVAILABLE, "PART_UNAVAILABLE", retry=_as_said, facts=_facts("part"))),
    (ShuttingDownError, _as(_UNAVAILABLE, SHUTTING_DOWN, retry=_soon)),
    (DeadlineError, _as(code_pb2.DEADLINE_EXCEEDED)),
    (TextUnavailableError, _as(_STATE)),
    (UnauthenticatedError, _as(code_pb2.UNAUTHENTICATED)),
)
