"""The reason why a bundle could not be loaded: one text for callers, without paths or addresses, one for operators."""

from dataclasses import dataclass
from typing import Self

from experts.errors import (
    ExpertCapacityError,
    InvalidBundleError,
    RegistryAwayError,
    RegistryError,
    SignatureError,
    UnknownBundleError,
)

# Asked from top to bottom; the first type that fits decides.
_REASONS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
    (UnknownBundleError, "the registry does not have the bundle"),
    (SignatureError, "the bundle is not signed as the configuration demands"),
    (InvalidBundleError, "the bundle is damaged or does not fit"),
    (ExpertCapacityError, "the memory limit of the experts leaves no room for it"),
    ((RegistryAwayError, RegistryError), "the registry cannot be read"),
    (MemoryError, "the replica has no memory for it"),
)


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """A load that failed.

    Attributes:
        reason: for callers of the service.
        text: for operators: the error's own words, which may name paths and addresses.
    """

    reason: str
    text: str

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """What is kept of an error; the error itself would keep what its frames hold."""
        reason = next((words for kinds, words in _REASONS if isinstance(error, kinds)), "loading it failed")
        return cls(reason, str(error) or type(error).__name__)
