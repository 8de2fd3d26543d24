"""Waits until something has come about, and fails when it does not in time."""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")

TIMEOUT_S = 20.0
PAUSE_S = 0.01


def until(
    condition: Callable[[], Found | None], what: str = "", *, timeout_s: float = TIMEOUT_S, pause_s: float = PAUSE_S
) -> Found:
    """Asks again and again, and returns the first answer that is true; `what` is said when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(pause_s)
    return found


async def until_async(condition: Callable[[], Found | None], what: str = "", *, timeout_s: float = TIMEOUT_S) -> Found:
    """As `until`, while the event loop goes on."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(PAUSE_S)
    return found
