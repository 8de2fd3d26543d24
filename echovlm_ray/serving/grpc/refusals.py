"""Counts the calls that a server refused, by reason and by the caller's name in the configuration."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping

from google.rpc import code_pb2

from echovlm_ray.errors import MessageTooLargeError, OverloadedError, UnauthenticatedError
from echovlm_ray.serving.core.failures import failure_of

# Callers that are told apart; all further ones count as without a name.
MAX_NAMES = 200


class Refusals:
    """Counts since the start. Belongs to one event loop."""

    def __init__(self, is_configured: Callable[[str], bool] = lambda name: False) -> None:
        """Takes whether the configuration gives a name to a caller; no other name is kept, whatever callers show."""
        self._is_configured = is_configured
        self._counts: Counter[tuple[str, str]] = Counter()
        self._seen: set[str] = set()

    @property
    def counts(self) -> Mapping[tuple[str, str], int]:
        """By reason and name; the name is "" where the configuration has none."""
        return self._counts

    def add(self, error: Exception, names: Collection[str]) -> None:
        """Counts the error that a call ended with, if it is a refusal.

        Args:
            error: that was raised.
            names: of the caller.
        """
        if reason := reason_of(error):
            self._counts[reason, self._known(names)] += 1

    def _known(self, names: Collection[str]) -> str:
        name = next(filter(self._is_configured, names), "")
        if name not in self._seen and len(self._seen) >= MAX_NAMES:
            return ""
        self._seen.add(name)
        return name


def reason_of(error: Exception) -> str:
    """Why a call was refused, in a word; "" where it ended for another reason."""
    if isinstance(error, OverloadedError):
        return error.reason
    if isinstance(error, UnauthenticatedError):
        return "credentials"
    if isinstance(error, MessageTooLargeError):
        return "message_size"
    return "busy" if failure_of(error).code == code_pb2.RESOURCE_EXHAUSTED else ""
