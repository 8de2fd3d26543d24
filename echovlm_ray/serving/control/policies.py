"""The policy that Routers apply: read after every change of the database, kept in a file, and told to who watches."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from echovlm_ray.serving.control.changes import Changes
from echovlm_ray.serving.control.messages import VersionOf, policy_to_proto
from echovlm_ray.serving.known_policy import write_policy
from protos import control_pb2
from router.rollouts.store import RolloutStore

logger = logging.getLogger(__name__)

RETRY_S = 1.0


class PolicyPublisher:
    """Nobody hears of a policy before it stands in the file. Made, started and watched on one event loop.

    It is published by the thread that changed the database, before anything else begins that the change leads to: a
    `promote` is in force once Routers hear of it, and whatever runs beside would only make that later.
    """

    def __init__(self, store: RolloutStore, version_of: VersionOf, path: Path | None) -> None:
        """Takes where the state is, digest → version, and the file; None keeps none."""
        self._store = store
        self._version_of = version_of
        self._path = path
        self._published = Changes()
        self._current: control_pb2.TrafficPolicy | None = None
        self._sequence = 0
        # Held from reading to publishing, so that no policy comes after a newer one.
        self._lock = threading.Lock()
        self._retry: threading.Timer | None = None
        self._unsubscribe: Callable[[], None] | None = None

    @property
    def current(self) -> control_pb2.TrafficPolicy:
        """The policy now, once started."""
        assert self._current is not None
        return self._current

    @property
    def sequence(self) -> int:
        """Up to which history entry `current` says what the database says; from any thread."""
        return self._sequence

    async def start(self) -> None:
        """Publishes the first policy, and from now on every other.

        Raises:
            RolloutStateError: there is no live set yet.
            OSError: the file cannot be written.
        """
        # First, or what changes while it is published would be missed.
        self._unsubscribe = self._store.subscribe(self._publish_or_retry, first=True)
        await asyncio.to_thread(self._publish)

    def stop(self) -> None:
        """Ends."""
        if self._unsubscribe is not None:
            self._unsubscribe()
        with self._lock:
            self._unsubscribe = None
            if self._retry is not None:
                self._retry.cancel()

    async def watch(self) -> AsyncIterator[control_pb2.TrafficPolicy]:
        """The policy now, and every later one; who is slow sees only the newest."""
        seen: control_pb2.TrafficPolicy | None = None
        with self._published.listener() as published:
            while True:
                published.clear()
                if seen is not self.current:
                    seen = self.current
                    yield seen
                else:
                    await published.wait()

    def _publish_or_retry(self) -> None:
        try:
            self._publish()
        except Exception:
            logger.exception("the policy cannot be published now; Routers go on with the one before")
            with self._lock:
                if self._unsubscribe is not None:
                    self._retry = threading.Timer(RETRY_S, self._publish_or_retry)
                    self._retry.daemon = True
                    self._retry.start()

    def _publish(self) -> None:
        """Publishes what the database says, unless it is what is published already; from any thread."""
        with self._lock:
            policy = self._read()
            if self._current is not None and _content(policy) == _content(self._current):
                self._sequence = policy.version
                return
            self._keep(policy)
            self._current, self._sequence = policy, policy.version
        self._published.announce()

    def _read(self) -> control_pb2.TrafficPolicy:
        return policy_to_proto(self._store.policy(), self._version_of)

    def _keep(self, policy: control_pb2.TrafficPolicy) -> None:
        if self._path is not None:
            write_policy(self._path, policy)


def _content(policy: control_pb2.TrafficPolicy) -> control_pb2.TrafficPolicy:
    """All but the number, which every entry of the history raises."""
    copy = control_pb2.TrafficPolicy()
    copy.CopyFrom(policy)
    copy.version = 0
    return copy
