"""Retries calls that did not reach a server, or lost it before any part of the answer arrived."""

import math
import random
import time
from collections.abc import Callable

import grpc

from echovlm_ray.client.errors import CallCancelledError, EchoVLMError, UnavailableError

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 2.0
# With less time than this a retry would only replace the error by an exceeded deadline.
SHORTEST_TRY_S = 0.5
# For calls without a timeout.
UNLIMITED_FOR_S = 60.0
# Jitter, so that not all callers of a lost server retry at once.
_JITTER = 0.2

Waiting = Callable[[EchoVLMError], None]


class Retries:
    """The attempts of one call with exponential backoff, until its timeout."""

    def __init__(self, timeout_s: float | None, *, retry: bool, waiting: Waiting | None = None) -> None:
        """
        Args:
            timeout_s: the timeout of the call with all attempts, in seconds; with None, attempts end after 60 s.
            retry: false allows only one attempt.
            waiting: called with the reason before each pause.
        """
        now = time.monotonic()
        self._deadline = math.inf if timeout_s is None else now + timeout_s
        self._give_up = self._deadline if timeout_s is not None else now + UNLIMITED_FOR_S
        self._retry = retry
        self._waiting = waiting
        self._pause_s = FIRST_PAUSE_S

    def remaining_s(self) -> float | None:
        """The time left for the next attempt; None for no limit."""
        return None if self._deadline == math.inf else max(0.0, self._deadline - time.monotonic())

    def pause_after(self, error: EchoVLMError) -> float:
        """The time to wait before the next attempt, in seconds.

        Raises:
            EchoVLMError: the error, if another attempt does not help or there is no time for one.
        """
        if not self._retry or not _is_lost(error):
            raise error
        pause_s = max(self._pause_s, getattr(error, "retry_after_s", None) or 0.0)
        pause_s *= 1 + random.uniform(0, _JITTER)
        if time.monotonic() + pause_s + SHORTEST_TRY_S >= self._give_up:
            raise error
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        if self._waiting is not None:
            self._waiting(error)
        return pause_s


def _is_lost(error: EchoVLMError) -> bool:
    # A server that shuts down may end a call as CANCELLED.
    return isinstance(error, UnavailableError) or (
        isinstance(error, CallCancelledError) and error.code == grpc.StatusCode.CANCELLED
    )
