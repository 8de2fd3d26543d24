"""A limit for the bytes of all requests in a server's memory.

The length of a message is known only after it has arrived, so an arriving one counts with the maximum length: a few
slots are assigned to senders in turn. No sender gets all of them, and health checks, which have no credentials, have
separate slots. So a sender whose messages do not arrive does not block others. A call that waits for a slot takes no
memory for its message, because it is not read. After a message has arrived, its length counts until the call ends or
releases it.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

from echovlm_ray.errors import DeadlineError, OverloadedError
from echovlm_ray.fair_queue import FairSemaphore

# A message that takes longer to arrive than the first ends its call, and than the second while others wait for a place.
ARRIVE_WITHIN_S = 300.0
ARRIVE_WITHIN_BUSY_S = 10.0
# The latter for a health check, whose message arrives together with its headers.
CHECK_WITHIN_BUSY_S = 1.0
# One in this many of the slots and bytes is not available to each sender.
RESERVED = 4
# Additional slots for health checks.
CHECKS = 2
# Calls of one sender that may wait for a place.
MAX_WAITING = 1000


class Receipt:
    """The bytes of one call's message, counted from `ReceivedBytes.hold` to `release`."""

    def __init__(self) -> None:
        self._received: ReceivedBytes | None = None
        self._sender = b""
        self._nbytes = 0

    def fill(self, received: "ReceivedBytes", sender: bytes, nbytes: int) -> None:
        """Called when they are counted."""
        self._received, self._sender, self._nbytes = received, sender, nbytes

    def release(self) -> None:
        """Says that the messages are not in memory any more; harmless when repeated."""
        if self._received is not None:
            self._received.let_go(self._sender, self._nbytes)
        self._nbytes = 0


_current: ContextVar[Receipt] = ContextVar("receipt", default=Receipt())  # noqa: B039


def current_receipt() -> Receipt:
    """Of the call that is being served; outside of one, and where nothing is counted, one of no bytes."""
    return _current.get()


def new_receipt() -> Receipt:
    """Creates the receipt of the current task's call."""
    receipt = Receipt()
    _current.set(receipt)
    return receipt


class Arrivals:
    """Slots for arriving messages. For one event loop."""

    def __init__(self, places: int, most_of_one: int, busy_s: float) -> None:
        """Takes how many there are, how many one sender may hold, and for how long while others wait."""
        self._places = FairSemaphore(places, most_of_one)
        self._busy_s = busy_s
        self._waiting: Counter[bytes] = Counter()
        # Of each message that is arriving: its time limit, its sender, and when it ends while others wait.
        self._arriving: dict[asyncio.Timeout, tuple[bytes, float]] = {}

    @asynccontextmanager
    async def place(self, sender: bytes) -> AsyncIterator[None]:
        """A context for reading one message; waits for a slot.

        Raises:
            OverloadedError: too many of the sender wait, or it took too long while others waited.
            DeadlineError: it took too long.
        """
        if self._places.must_wait(sender):
            await self._wait(sender)
        else:
            await self._places.acquire(sender)
        now = asyncio.get_running_loop().time()
        busy_at = now + self._busy_s
        limit = asyncio.timeout_at(now + ARRIVE_WITHIN_S)
        try:
            async with limit:
                self._arriving[limit] = sender, busy_at
                if self._waiting:
                    self._hurry()
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            if limit.when() == busy_at:
                raise OverloadedError(
                    f"the request did not arrive within {self._busy_s:g} seconds, while others waited to be received: "
                    "send it again"
                ) from None
            raise DeadlineError(f"the request did not arrive within {ARRIVE_WITHIN_S:g} seconds") from None
        finally:
            self._arriving.pop(limit, None)
            self._places.release(sender)

    async def _wait(self, sender: bytes) -> None:
        if self._waiting[sender] >= MAX_WAITING:
            raise OverloadedError(
                f"{MAX_WAITING} requests of this caller wait to be received, and that is the limit: send the request "
                "again when some have come"
            )
        self._waiting[sender] += 1
        self._hurry()
        try:
            await self._places.acquire(sender)
        finally:
            self._waiting[sender] -= 1
            if not self._waiting[sender]:
                del self._waiting[sender]

    def _hurry(self) -> None:
        """Limits the time of messages whose slots others wait for."""
        waiting = [sender for sender in self._waiting if self._places.must_wait(sender)]
        # A sender at its limit waits only for its own slots.
        for_any = any(not self._places.has_most(sender) for sender in waiting)
        for limit, (sender, busy_at) in self._arriving.items():
            when = limit.when()
            if (for_any or sender in waiting) and not limit.expired() and (when is None or when > busy_at):
                limit.reschedule(busy_at)


class ReceivedBytes:
    """The budget of one server. For one event loop.

    Attributes:
        held_bytes: of messages that have arrived and are still needed.
    """

    def __init__(self, max_message_bytes: int, max_bytes: int) -> None:
        """Half of `max_bytes` is for messages that are arriving, each counted as the longest; half for the others."""
        self.held_bytes = 0
        self._max_bytes = max_bytes
        self._max_held = max_bytes // 2
        self._max_held_by_one = max(max_message_bytes, self._max_held - self._max_held // RESERVED)
        self._held: Counter[bytes] = Counter()
        places = max(1, max_bytes // 2 // max_message_bytes)
        self._arrivals = Arrivals(places, max(1, places - max(1, places // RESERVED)), ARRIVE_WITHIN_BUSY_S)
        self._checks = Arrivals(CHECKS, CHECKS - 1, CHECK_WITHIN_BUSY_S)

    def arrivals(self, *, of_checks: bool) -> Arrivals:
        """Where the messages of health checks arrive, or all others."""
        return self._checks if of_checks else self._arrivals

    def hold(self, sender: bytes, nbytes: int) -> None:
        """Counts a message that has come, on the receipt of the call that is being served.

        Raises:
            OverloadedError: there are too many others, or too many of the sender.
        """
        if self.held_bytes + nbytes > self._max_held:
            raise OverloadedError(
                f"requests of {self.held_bytes} bytes are under way, and with this one's {nbytes} there would be more "
                f"than half of the {self._max_bytes} that the server keeps (max_received_bytes): send it again a "
                "little later"
            )
        if self._held[sender] + nbytes > self._max_held_by_one:
            raise OverloadedError(
                f"requests of this caller of {self._held[sender]} bytes are under way, and with this one's {nbytes} "
                f"there would be more than the {self._max_held_by_one} that the server keeps of one caller "
                "(max_received_bytes, of which a part is for others): send it again a little later"
            )
        self.held_bytes += nbytes
        self._held[sender] += nbytes
        current_receipt().fill(self, sender, nbytes)

    def let_go(self, sender: bytes, nbytes: int) -> None:
        """Called by a receipt."""
        self.held_bytes -= nbytes
        self._held[sender] -= nbytes
        if not self._held[sender]:
            del self._held[sender]
