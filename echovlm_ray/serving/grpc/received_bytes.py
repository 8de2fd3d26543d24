"""A limit for the bytes of all requests in a server's memory.

How long a message is shows only when it has come, so one that is arriving counts as the longest that there may be: a
few places are given out, to one sender after the other. No sender gets all of them, and health checks, which need no
credentials, have their own, see `CheckArrivals`. So a sender whose messages do not come keeps no other one waiting. A
call that waits for a place costs no memory for its message, because nothing of it is read. When a message has come, its
own length counts until the call ends or says that it is done with it.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

from echovlm_ray.errors import DeadlineError, OverloadedError
from echovlm_ray.fair_queue import FairSemaphore
from echovlm_ray.serving.grpc.recycled import RecycledPlaces

# A message that takes longer to arrive than the first ends its call, and than the second while others wait for a place.
ARRIVE_WITHIN_S = 300.0
ARRIVE_WITHIN_BUSY_S = 10.0
# Of the places and the bytes, one in so many is kept from each sender.
RESERVED = 4
# Places for health checks, besides the others; and how long a message, which comes together with its headers, may take.
CHECKS = 4
CHECK_WITHIN_S = 10.0
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
                    "send it again",
                    reason="received_bytes",
                ) from None
            raise DeadlineError(f"the request did not arrive within {ARRIVE_WITHIN_S:g} seconds") from None
        finally:
            self._arriving.pop(limit, None)
            self._places.release(sender)

    async def _wait(self, sender: bytes) -> None:
        if self._waiting[sender] >= MAX_WAITING:
            raise OverloadedError(
                f"{MAX_WAITING} requests of this caller wait to be received, and that is the limit: send the request "
                "again when some have come",
                reason="received_bytes",
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


class CheckArrivals:
    """Places in which messages of health checks arrive. Belongs to one event loop.

    A check never waits for one: if all are taken, another check ends, see `RecycledPlaces`.
    """

    def __init__(self, places: int) -> None:
        self._places = RecycledPlaces(places)

    @asynccontextmanager
    async def place(self, sender: bytes) -> AsyncIterator[None]:
        """To be held while one message is read.

        Raises:
            OverloadedError: it did not come before other checks did.
            DeadlineError: it took too long.
        """
        limit = asyncio.timeout(CHECK_WITHIN_S)
        replaced = False

        def end() -> None:
            nonlocal replaced
            replaced = True
            limit.reschedule(0)

        try:
            async with limit:
                with self._places.place(sender, end):
                    yield
        except TimeoutError:
            if not limit.expired():
                raise
            if replaced:
                raise OverloadedError(
                    "the message of this health check had not arrived when others came: send it again",
                    reason="health_checks",
                ) from None
            raise DeadlineError(f"the message did not arrive within {CHECK_WITHIN_S:g} seconds") from None


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
        self._checks = CheckArrivals(CHECKS)

    def arrivals(self, *, of_checks: bool) -> Arrivals | CheckArrivals:
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
                "little later",
                reason="received_bytes",
            )
        if self._held[sender] + nbytes > self._max_held_by_one:
            raise OverloadedError(
                f"requests of this caller of {self._held[sender]} bytes are under way, and with this one's {nbytes} "
                f"there would be more than the {self._max_held_by_one} that the server keeps of one caller "
                "(max_received_bytes, of which a part is for others): send it again a little later",
                reason="received_bytes",
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
