"""The reason why a bundle could not be loaded: one text for callers, without paths or addresses, one for operators."""

from dataclasses import dataclass
from typing import Self

from experts.errors import (
    ExpertCapacityError,
    InvalidBundleError,
    RegistryError,
    RegistryUnavailableError,
    SignatureError,
    UnknownBundleError,
)

# The first type that matches decides.
_REASONS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
    (UnknownBundleError, "the registry does not have the bundle"),
    (SignatureError, "the bundle is not signed as the configuration demands"),
    (InvalidBundleError, "the bundle is damaged or does not fit"),
    (ExpertCapacityError, "the memory limit of the experts leaves no room for it"),
    ((RegistryUnavailableError, RegistryError), "the registry cannot be read"),
    (MemoryError, "the replica has no memory for it"),
)


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """A failed load.

    Attributes:
        reason: the reason for callers of the service.
        text: the error's text for operators, which may contain paths and addresses.
    """

    reason: str
    text: str

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """Extracts the texts of an error. The exception object would keep its frames alive."""
        reason = next((words for kinds, words in _REASONS if isinstance(error, kinds)), "loading it failed")
        return cls(reason, str(error) or type(error).__name__)
