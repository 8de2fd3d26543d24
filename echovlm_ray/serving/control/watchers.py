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
        streams: how many of its calls are open: two for a moment when it connects again.
        policy_version: of the policy in force in it; 0 before it has said so.
    """

    kind: WatcherKind
    streams: int = 0
    policy_version: int = 0


class Watchers:
    """Made on the event loop that serves them. Changed on it alone, read from any thread.

    Attributes:
        changes: announces every connection, disconnection and policy taken up.
    """

    def __init__(self) -> None:
        self.changes = Changes()
        self._watchers: dict[str, _Watcher] = {}

    def connected(self, kind: WatcherKind = "router") -> frozenset[str]:
        """The names of the Routers, or gateways, that are connected now."""
        return frozenset(name for name, watcher in list(self._watchers.items()) if watcher.kind == kind)

    def behind(self, policy_version: int) -> tuple[str, ...]:
        """The names of those connected in which another policy is in force than this one."""
        watchers = list(self._watchers.items())
        return tuple(sorted(name for name, watcher in watchers if watcher.policy_version != policy_version))

    @contextmanager
    def watching(self, kind: WatcherKind, name: str) -> Iterator[None]:
        """Counts a call of a watcher for the block; one without a name is not counted."""
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

    def take_up(self, name: str, policy_version: int) -> None:
        """Records the policy in force in a watcher. One that is not connected says it again when it is."""
        if (watcher := self._watchers.get(name)) is not None:
            watcher.policy_version = policy_version
            self.changes.announce()
