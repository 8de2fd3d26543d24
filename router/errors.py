"""Errors between the router and the expert groups."""


class UnknownOrganError(LookupError):
    """A request named an organ that the expert set does not have. The text lists the organs."""


class OrganPendingError(RuntimeError):
    """A request named an organ that is unknown here while a policy with new organs is being applied. Retrying helps."""

    def __init__(self, retry_after_s: float = 0.2) -> None:
        super().__init__("the organ may just have been added; sending the request again is safe")
        self.retry_after_s = retry_after_s


class OrganInCanaryError(RuntimeError):
    """A request named a new organ that is still a canary, and the request is not in the canary's share."""

    def __init__(self, organ: str, percent: float) -> None:
        """`percent` is the canary's share of the requests."""
        super().__init__(
            f"the organ {organ!r} is new and in canary: its experts answer {percent:g} % of the requests, and this one "
            "was not chosen. The same session, or request id, is chosen only once the percentage is raised: leave the "
            "organ out, or ask again when it is promoted"
        )
        self.organ = organ
        self.percent = percent


class TooManyOrgansError(ValueError):
    """A request named more organs than the limit, which the text names."""


class ExpertsUnavailableError(RuntimeError):
    """No replica of an organ's expert group answers now; a later retry is safe.

    Attributes:
        since: since when no replica answered the failed request, in `time.monotonic` seconds; 0 if it did not wait.
    """

    since = 0.0

    def __init__(self, organ: str, reason: str, retry_after_s: float = 1.0) -> None:
        """`retry_after_s` is the time to wait before a retry."""
        super().__init__(f"the experts of {organ!r} are not available: {reason}")
        self.organ = organ
        self.reason = reason
        self.retry_after_s = retry_after_s


class ExpertsUnusableError(ExpertsUnavailableError):
    """No replica of an organ could load the version that a request needs. A retry does not help."""

    def __init__(self, organ: str, digest: str, reason: str, version: str = "") -> None:
        """`reason` is shown to callers and must not name addresses or paths."""
        super().__init__(organ, f"no replica could load version {version or digest[:12]}: {reason}")
        self.digest = digest
        self.version = version
        self.reason = reason


class ExpertsFailedError(RuntimeError):
    """An organ's experts refused or failed to compute a call. A retry does not help."""

    def __init__(self, organ: str, reason: str) -> None:
        super().__init__(f"the experts of {organ!r} failed: {reason}")
        self.organ = organ


class RolloutStateError(ValueError):
    """The operation is not possible in the current state. The text names the possible ones."""


class UnknownRolloutError(LookupError):
    """There is no such rollout or version. The text lists the existing ones."""


class UnknownExpertSetError(LookupError):
    """No request of this deployment was ever assigned to this expert set."""

    def __init__(self, expert_set_id: str) -> None:
        super().__init__(
            f"this deployment never served the expert set {expert_set_id[:64]!r}: check the id, and that this is the "
            "system that gave the answer. Sets that were replaced before the system kept their composition are not "
            "known either"
        )


class ExpertSetNotServedError(ValueError):
    """A request named an expert set that is not loaded now. The text names the command that loads it."""

    def __init__(self, expert_set_id: str) -> None:
        super().__init__(
            f"the expert set {expert_set_id[:12]}… is not among those that are served now: to compute a past answer "
            "again, save its request with `echoray generate --save-request` and use `echoray experts replay`"
        )


class ReplayRefusedError(ValueError):
    """A past expert set cannot be loaded for a replay. The text names the organ, the version and the reason."""

    def __init__(self, organ: str, version: str, reason: str) -> None:
        """Names the bundle that cannot be used, and the reason."""
        super().__init__(f"the answer cannot be computed again: {organ} {version} {reason}")
        self.organ = organ
        self.version = version
        self.reason = reason


class InvalidRolloutRequestError(ValueError):
    """The arguments of an operation are invalid, for example a percentage of 300."""

    def __init__(self, field: str, description: str) -> None:
        """Names the field of the request and the problem."""
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


class RolloutDatabaseError(RuntimeError):
    """The rollouts' database is unreachable, damaged or of another version. The text names the fix."""


class RolloutDatabaseUnavailableError(RolloutDatabaseError):
    """The rollouts' database is locked or unreachable now. Nothing was changed; a later retry is safe."""


class RolloutDatabaseFullError(RolloutDatabaseError):
    """The disk of the rollouts' database is full. Nothing was changed. The text names the folder."""


class RolloutDatabaseLostError(RolloutDatabaseError):
    """The rollouts' database was deleted or replaced since it was opened. Nothing was written. The text has the fix."""
