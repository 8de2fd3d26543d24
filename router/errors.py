"""Errors between the router and the expert groups."""


class UnknownOrganError(LookupError):
    """A request named an organ that the expert set does not have. The text names the organs that there are."""


class OrganPendingError(RuntimeError):
    """A request named an organ that this router does not know, and a policy is on its way that brings new ones."""

    def __init__(self, retry_after_s: float = 0.2) -> None:
        super().__init__("the organ may just have been added; sending the request again is safe")
        self.retry_after_s = retry_after_s


class OrganInCanaryError(RuntimeError):
    """A request named a new organ whose experts answer only a part of the requests, and it is not among them."""

    def __init__(self, organ: str, percent: float) -> None:
        """Names the organ and the part of the requests, in percent."""
        super().__init__(
            f"the organ {organ!r} is new and in canary: its experts answer {percent:g} % of the requests, and this one "
            "was not chosen. The same session, or request id, is chosen only once the percentage is raised: leave the "
            "organ out, or ask again when it is promoted"
        )
        self.organ = organ
        self.percent = percent


class TooManyOrgansError(ValueError):
    """A request named more organs than it may use. The text names the limit."""


class ExpertsUnavailableError(RuntimeError):
    """No replica of an organ's expert group answers now; sending again later is safe.

    Attributes:
        since: from when on no replica answered the request that ended by it, in `time.monotonic` seconds; 0 where it
            did not wait.
    """

    since = 0.0

    def __init__(self, organ: str, reason: str, retry_after_s: float = 1.0) -> None:
        """Names the organ, says why, and how long to wait before another try."""
        super().__init__(f"the experts of {organ!r} are not available: {reason}")
        self.organ = organ
        self.reason = reason
        self.retry_after_s = retry_after_s


class ExpertsUnusableError(ExpertsUnavailableError):
    """No replica of an organ could load the version that a request needs, so waiting does not help it."""

    def __init__(self, organ: str, digest: str, reason: str, version: str = "") -> None:
        """Names the bundle, and its version where it is known; the reason names no place inside the system."""
        super().__init__(organ, f"no replica could load version {version or digest[:12]}: {reason}")
        self.digest = digest
        self.version = version
        self.reason = reason


class ExpertsFailedError(RuntimeError):
    """An organ's experts answered that they cannot compute a call; sending it again would not help."""

    def __init__(self, organ: str, reason: str) -> None:
        super().__init__(f"the experts of {organ!r} failed: {reason}")
        self.organ = organ


class RolloutStateError(ValueError):
    """A rollout, an organ or a version is not in a state in which that can be done. The text says what can."""


class UnknownRolloutError(LookupError):
    """There is no such rollout or version. The text names what there is."""


class UnknownExpertSetError(LookupError):
    """No request of this deployment ever got this expert set."""

    def __init__(self, expert_set_id: str) -> None:
        super().__init__(
            f"this deployment never served the expert set {expert_set_id[:64]!r}: check the id, and that this is the "
            "system that gave the answer. Sets that were replaced before the system kept their composition are not "
            "known either"
        )


class ExpertSetNotServedError(ValueError):
    """A request named an expert set that no request gets now. The text says how to bring it back."""

    def __init__(self, expert_set_id: str) -> None:
        super().__init__(
            f"the expert set {expert_set_id[:12]}… is not among those that are served now: to compute a past answer "
            "again, save its request with `echoray generate --save-request` and use `echoray experts replay`"
        )


class ReplayRefusedError(ValueError):
    """A past expert set cannot answer again. The text names the organ, the version and the reason."""

    def __init__(self, organ: str, version: str, reason: str) -> None:
        """Says which bundle of the set cannot be used, and why."""
        super().__init__(f"the answer cannot be computed again: {organ} {version} {reason}")
        self.organ = organ
        self.version = version
        self.reason = reason


class InvalidRolloutRequestError(ValueError):
    """What was asked of a rollout makes no sense in itself, for example a percentage of 300."""

    def __init__(self, field: str, description: str) -> None:
        """Names the field of the request and what is wrong with it."""
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


class RolloutDatabaseError(RuntimeError):
    """The rollouts' database cannot be used: another version's, out of reach, or damaged. The text says what to do."""


class RolloutDatabaseUnavailableError(RolloutDatabaseError):
    """The rollouts' database is locked or out of reach now; nothing was changed, and asking again later is safe."""


class RolloutDatabaseFullError(RolloutDatabaseError):
    """The rollouts' database has no room to write; nothing was changed. The text says where to make some."""


class RolloutDatabaseLostError(RolloutDatabaseError):
    """The database that was opened is not there any more: deleted, or another one is in its place. Nothing was written.
    The text says what to do."""
