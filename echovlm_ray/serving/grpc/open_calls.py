"""A bound on the calls that gRPC holds for one sender, until each has been read to its end.

A server cannot take back what it has written: of a caller that does not read, gRPC keeps the call with its last message
until the connection ends, also when the call has ended for us and its place is another one's.
"""

from collections import Counter
from functools import partial
from typing import Any

import grpc

from echovlm_ray.errors import OverloadedError

# Of one sender; each takes some 60 KB where its answer is not read.
MAX_OPEN_CALLS = 1000


class OpenCalls:
    """Counts them. Belongs to one event loop."""

    def __init__(self) -> None:
        self._open: Counter[bytes] = Counter()

    def count(self, sender: bytes) -> int:
        """Calls of a sender that gRPC holds."""
        return self._open[sender]

    def enter(self, sender: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        """Counts a call from now on, until the sender has read its status or is gone.

        Raises:
            OverloadedError: there are too many of the sender.
        """
        if self._open[sender] >= MAX_OPEN_CALLS:
            raise OverloadedError(
                f"{self._open[sender]} calls of this caller are open, and that is the limit: read their answers to the "
                "end, or cancel them",
                reason="open_calls",
            )
        self._open[sender] += 1
        context.add_done_callback(partial(self._leave, sender))

    def _leave(self, sender: bytes, context: object) -> None:
        self._open[sender] -= 1
        if not self._open[sender]:
            del self._open[sender]
