"""A bound on the bytes of requests in a server's memory, over all calls together.

How long a message is shows only when it has come, so one that is arriving counts as the longest that there may be: a
few places are given out one after the other. A call that waits for a place costs no memory, because nothing of it is
read. When a message has come, its own length counts until the call ends or says that it is done with it.
"""

import asyncio
from contextvars import ContextVar
from types import TracebackType

from echovlm_ray.errors import DeadlineError, OverloadedError

# A message that takes longer to arrive than the first ends its call, and than the second while others wait for a place.
ARRIVE_WITHIN_S = 300.0
ARRIVE_WITHIN_BUSY_S = 10.0


class Receipt:
    """The bytes of one call's message, counted from `ReceivedBytes.hold` until `release`."""

    def __init__(self) -> None:
        self._received: ReceivedBytes | None = None
        self._nbytes = 0

    def fill(self, received: "ReceivedBytes", nbytes: int) -> None:
        """Called when they are counted."""
        self._received, self._nbytes = received, nbytes

    def release(self) -> None:
        """Says that the messages are not in memory any more; harmless when repeated."""
        if self._received is not None:
            self._received.held_bytes -= self._nbytes
        self._nbytes = 0


_current: ContextVar[Receipt] = ContextVar("receipt", default=Receipt())  # noqa: B039


def current_receipt() -> Receipt:
    """Of the call that is being served; outside of one, and where nothing is counted, one of no bytes."""
    return _current.get()


def new_receipt() -> Receipt:
    """Gives the call that the current task serves one of its own."""
    receipt = Receipt()
    _current.set(receipt)
    return receipt


class _Arrival:
    """One message that is being read."""

    def __init__(self, received: "ReceivedBytes") -> None:
        self._received = received

    async def __aenter__(self) -> None:
        await self._received.take_place()
        now = asyncio.get_running_loop().time()
        self._busy_at = now + ARRIVE_WITHIN_BUSY_S
        self._limit = asyncio.timeout_at(now + ARRIVE_WITHIN_S)
        await self._limit.__aenter__()
        self._received.begin(self._limit, self._busy_at)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._received.end(self._limit)
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError:
            if self._limit.when() == self._busy_at:
                raise OverloadedError(
                    f"the request did not arrive within {ARRIVE_WITHIN_BUSY_S:g} seconds, while others waited to be "
                    "received: send it again"
                ) from None
            raise DeadlineError(f"the request did not arrive within {ARRIVE_WITHIN_S:g} seconds") from None


class ReceivedBytes:
    """The budget of one server. Belongs to one event loop.

    Attributes:
        held_bytes: of messages that have come and are still needed.
    """

    def __init__(self, max_message_bytes: int, max_bytes: int) -> None:
        """Half of `max_bytes` is for messages that are arriving, each counted as the longest; half for the others."""
        self.held_bytes = 0
        self._max_bytes = max_bytes
        self._max_held = max_bytes // 2
        self._places = asyncio.Semaphore(max(1, max_bytes // 2 // max_message_bytes))
        self._waiting = 0
        # Of each message that is arriving: its time limit, and when it must give way while others wait.
        self._arriving: dict[asyncio.Timeout, float] = {}

    def arriving(self) -> "_Arrival":
        """To be held while one message is read; waits for a place.

        Raises:
            OverloadedError: it took too long while others waited.
            DeadlineError: it took too long.
        """
        return _Arrival(self)

    async def take_place(self) -> None:
        """Waits for a place, and has those that have one hurry."""
        if self._places.locked():
            self._hurry()
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1

    def begin(self, limit: asyncio.Timeout, busy_at: float) -> None:
        """Records a message that is arriving, and when its time is over while others wait."""
        self._arriving[limit] = busy_at
        if self._waiting:
            self._hurry()

    def end(self, limit: asyncio.Timeout) -> None:
        """Gives a place back."""
        self._arriving.pop(limit, None)
        self._places.release()

    def hold(self, nbytes: int) -> None:
        """Counts a message that has come, on the receipt of the call that is being served.

        Raises:
            OverloadedError: there are too many others.
        """
        if self.held_bytes + nbytes > self._max_held:
            raise OverloadedError(
                f"requests of {self.held_bytes} bytes are under way, and with this one's {nbytes} there would be more "
                f"than half of the {self._max_bytes} that the server keeps (max_received_bytes): send it again a "
                "little later"
            )
        self.held_bytes += nbytes
        current_receipt().fill(self, nbytes)

    def _hurry(self) -> None:
        for limit, busy_at in self._arriving.items():
            when = limit.when()
            if not limit.expired() and (when is None or when > busy_at):
                limit.reschedule(busy_at)
