"""A bound on the bytes of requests in a server's memory, over all calls together.

How long a message is shows only when it has come, so one that is arriving counts as the longest that there may be: a
few places are given out one after the other. A call that waits for a place costs no memory, because nothing of it is
read. When a message has come, its own length counts until the call ends or says that it is done with it.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

from echovlm_ray.errors import DeadlineError, OverloadedError

# A message that takes longer to arrive than the first ends its call, and than the second while others wait for a place.
ARRIVE_WITHIN_S = 300.0
ARRIVE_WITHIN_BUSY_S = 10.0


class Receipt:
    """The bytes of one call's messages, counted until `release`."""

    def __init__(self, received: "ReceivedBytes | None" = None, nbytes: int = 0) -> None:
        self._received = received
        self._nbytes = nbytes

    def release(self) -> None:
        """Says that the messages are not in memory any more; harmless when repeated."""
        if self._received is not None:
            self._received.held_bytes -= self._nbytes
        self._nbytes = 0


_current: ContextVar[Receipt] = ContextVar("receipt", default=Receipt())  # noqa: B039


def current_receipt() -> Receipt:
    """Of the call that is being served; outside of one, and where nothing is counted, one of no bytes."""
    return _current.get()


def set_receipt(receipt: Receipt) -> None:
    """Makes it that of the call that the current task serves."""
    _current.set(receipt)


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

    @asynccontextmanager
    async def arriving(self) -> AsyncIterator[None]:
        """To be held while one message is read; waits for a place.

        Raises:
            OverloadedError: it took too long while others waited.
            DeadlineError: it took too long.
        """
        if self._places.locked():
            self._hurry()
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        limit = asyncio.timeout(ARRIVE_WITHIN_S)
        try:
            async with limit:
                busy_at = asyncio.get_running_loop().time() + ARRIVE_WITHIN_BUSY_S
                self._arriving[limit] = busy_at
                if self._waiting:
                    self._hurry()
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            if limit.when() == busy_at:
                raise OverloadedError(
                    f"the request did not arrive within {ARRIVE_WITHIN_BUSY_S:g} seconds, while others waited to be "
                    "received: send it again"
                ) from None
            raise DeadlineError(f"the request did not arrive within {ARRIVE_WITHIN_S:g} seconds") from None
        finally:
            self._arriving.pop(limit, None)
            self._places.release()

    def hold(self, nbytes: int) -> Receipt:
        """Counts a message that has come.

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
        return Receipt(self, nbytes)

    def _hurry(self) -> None:
        for limit, busy_at in self._arriving.items():
            when = limit.when()
            if not limit.expired() and (when is None or when > busy_at):
                limit.reschedule(busy_at)
