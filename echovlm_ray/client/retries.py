"""Retries a call that found no server, or lost it before any part of the answer arrived."""

import math
import random
import time
from collections.abc import Callable

import grpc

from echovlm_ray.client.errors import CallCancelledError, EchoVLMError, UnavailableError

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 2.0
# A try that has less time than this would only replace the reason by a deadline that passed.
SHORTEST_TRY_S = 0.5
# Of calls without a timeout of their own.
UNLIMITED_FOR_S = 60.0
# So that the callers of a server that was lost do not all come back at once.
_JITTER = 0.2

Waiting = Callable[[EchoVLMError], None]


class Retries:
    """The tries of one call, with pauses between them that grow, until the call's own timeout is over."""

    def __init__(self, timeout_s: float | None, *, retry: bool, waiting: Waiting | None = None) -> None:
        """
        Args:
            timeout_s: of the call with all its tries, in seconds; None for no limit, and then tries end after 60 s.
            retry: false allows one try.
            waiting: called with the reason before each pause.
        """
        now = time.monotonic()
        self._deadline = math.inf if timeout_s is None else now + timeout_s
        self._give_up = self._deadline if timeout_s is not None else now + UNLIMITED_FOR_S
        self._retry = retry
        self._waiting = waiting
        self._pause_s = FIRST_PAUSE_S

    def remaining_s(self) -> float | None:
        """What is left for the next try; None for no limit."""
        return None if self._deadline == math.inf else max(0.0, self._deadline - time.monotonic())

    def pause_after(self, error: EchoVLMError) -> float:
        """How long to wait before the next try, in seconds.

        Raises:
            EchoVLMError: the error itself, where another try does not help or there is no time for one.
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
    # A server that stops ends a call that races with it as CANCELLED.
    return isinstance(error, UnavailableError) or (
        isinstance(error, CallCancelledError) and error.code == grpc.StatusCode.CANCELLED
    )
