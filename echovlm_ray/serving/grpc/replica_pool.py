"""Channels to the replicas of a part, one an address, and how many calls are under way on each."""

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

Channel = TypeVar("Channel")
_NONE_TRIED: Mapping[str, int] = {}


class ReplicaPool(Generic[Channel]):
    """Opens a channel at the first call to an address and keeps it while the replica lives. Safe from several threads.

    A `grpc.aio` channel on which nothing runs is closed with its last reference, so `least_busy` only drops it.
    """

    def __init__(self, open_channel: Callable[[str], Channel]) -> None:
        """`open_channel` opens one to an address, such as `InnerChannels.asynchronous`."""
        self._open = open_channel
        self._lock = threading.Lock()
        self._channels: dict[str, Channel] = {}
        self._calls: Counter[str] = Counter()

    def channel(self, address: str) -> Channel:
        """The channel to an address."""
        with self._lock:
            if address not in self._channels:
                self._channels[address] = self._open(address)
            return self._channels[address]

    @contextmanager
    def call(self, address: str) -> Iterator[Channel]:
        """The channel to an address for one call, which counts until the block ends."""
        self._count(address, 1)
        try:
            yield self.channel(address)
        finally:
            self._count(address, -1)

    def least_busy(self, live: Sequence[str], tried: Mapping[str, int] = _NONE_TRIED) -> str | None:
        """Of the live replicas, the one that was tried least and, among those, has the fewest calls; None without any.

        Channels to other replicas are dropped once no call runs on them.
        """
        with self._lock:
            for address in set(self._channels) - {*live, *self._calls}:
                del self._channels[address]
            return min(live, key=lambda address: (tried.get(address, 0), self._calls[address]), default=None)

    def keep_only(self, addresses: Collection[str]) -> list[Channel]:
        """Drops the channels to all other addresses; they are the caller's to close."""
        with self._lock:
            return [self._channels.pop(address) for address in set(self._channels) - set(addresses)]

    def _count(self, address: str, calls: int) -> None:
        with self._lock:
            self._calls[address] += calls
            if not self._calls[address]:
                del self._calls[address]
