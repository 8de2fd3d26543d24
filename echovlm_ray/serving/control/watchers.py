"""The Routers and gateways that are connected to Control, and the policy that each of them applies."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from echovlm_ray.serving.control.changes import Changes

WatcherKind = Literal["router", "gateway"]


@dataclass(slots=True)
class _Watcher:
    """A process that watches the policy.

    Attributes:
        streams: the number of its open calls: two for a short time when it reconnects.
        policy_version: the version of the policy that it applies; 0 before its acknowledgement.
    """

    kind: WatcherKind
    streams: int = 0
    policy_version: int = 0


class Watchers:
    """Create and change it on its event loop; read it from any thread.

    Attributes:
        changes: announces every connection, disconnection and acknowledgement.
    """

    def __init__(self) -> None:
        self.changes = Changes()
        self._watchers: dict[str, _Watcher] = {}

    def connected(self, kind: WatcherKind = "router") -> frozenset[str]:
        """The names of the connected Routers, or gateways."""
        return frozenset(name for name, watcher in list(self._watchers.items()) if watcher.kind == kind)

    def behind(self, policy_version: int) -> tuple[str, ...]:
        """The names of connected watchers that apply another policy than this one."""
        watchers = list(self._watchers.items())
        return tuple(sorted(name for name, watcher in watchers if watcher.policy_version != policy_version))

    @contextmanager
    def watching(self, kind: WatcherKind, name: str) -> Iterator[None]:
        """Counts a watcher's call within the block. Calls without a name are not counted."""
        watcher = self._watchers.setdefault(name, _Watcher(kind)) if name else _Watcher(kind)
        watcher.streams += 1
        self.changes.announce()
        try:
            yield
        finally:
            watcher.streams -= 1
            if not watcher.streams:
                self._watchers.pop(name, None)
            self.changes.announce()

    def acknowledge(self, name: str, policy_version: int) -> None:
        """Records the policy that a watcher applies. Ignored if it is not connected: it acknowledges again after
        connecting.
        """
        if (watcher := self._watchers.get(name)) is not None:
            watcher.policy_version = policy_version
            self.changes.announce()
