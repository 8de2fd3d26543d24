"""The policy that Routers apply: read after every change of the database, kept in a file, and sent to watchers."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from echovlm_ray.serving.cluster.known_policy import check_identity, read_policy, write_policy
from echovlm_ray.serving.control.changes import Changes
from echovlm_ray.serving.control.messages import VersionOf, policy_to_proto
from protos import control_pb2
from router.errors import RolloutStateError
from router.rollouts.records import Snapshot
from router.rollouts.store import RolloutStore
from router.rollouts.traffic import TrafficPolicy

logger = logging.getLogger(__name__)

RETRY_S = 1.0


class PolicyPublisher:
    """Publishes a policy after writing it to the file. Create, start and watch it on one event loop.

    The thread that changed the database publishes the policy before other effects of the change begin: a `promote` is
    in force once Routers receive it, and concurrent work would delay that.
    """

    def __init__(self, store: RolloutStore, version_of: VersionOf, path: Path | None) -> None:
        """Takes the store, digest → version, and the file; None for no file."""
        self._store = store
        self._version_of = version_of
        self._path = path
        self._published = Changes()
        self._current: control_pb2.TrafficPolicy | None = None
        self._sequence = 0
        self._digest = ""
        # The policy is published again, even if it is unchanged, until its version is above this one.
        self._seen_elsewhere = 0
        # Whether the file has the published policy.
        self._kept = False
        # Held from reading to publishing, so that policies are published in order.
        self._lock = threading.Lock()
        self._retry: threading.Timer | None = None
        self._unsubscribe: Callable[[], None] | None = None

    @property
    def current(self) -> control_pb2.TrafficPolicy:
        """The current policy, once started."""
        assert self._current is not None
        return self._current

    @property
    def sequence(self) -> int:
        """The newest history entry that `current` includes. Thread-safe."""
        return self._sequence

    async def start(self) -> None:
        """Publishes the first policy, and every later one.

        Its version is above that of the file's policy, unless they are equal: the database may be a restored older one.

        Raises:
            RolloutStateError: there is no live set yet.
            ForeignPolicyError: the file is another deployment's.

        If writing the file fails, for example on a full disk, the first policy is published anyway and written later,
        because refusing to start would be worse.
        """
        # Subscribed first, so that changes during the publication are not missed.
        self._unsubscribe = self._store.subscribe(self._publish_or_retry, first=True)
        await asyncio.to_thread(self._begin)

    def outrun(self, identity: str, version: int, digest: str) -> None:
        """Publishes a policy with a version above the watcher's, so that it applies the database's state. Blocks;
        thread-safe.

        Args:
            identity: the identity of the watcher's deployment; "" if unknown.
            version: the version of the policy that it applies; 0 for none.
            digest: the content digest of that policy; "" if unknown.

        Raises:
            RolloutStateError: the watcher belongs to another deployment.
            RolloutDatabaseError: writing the database failed.
        """
        current = self.current
        if identity and identity != current.identity:
            raise RolloutStateError(
                f"this Control serves the deployment {current.identity[:12]}…, not {identity[:12]}…: two systems must "
                "not share a name on a cluster"
            )
        if version > current.version or (version == current.version and digest not in ("", self._digest)):
            logger.warning(
                "a Router applies policy %d, which the database does not know: an older state of it was restored. "
                "What it says now is published with a larger number",
                version,
            )
            self._outrun(version)
            self._publish()

    def stop(self) -> None:
        if self._unsubscribe is not None:
            self._unsubscribe()
        with self._lock:
            self._unsubscribe = None
            if self._retry is not None:
                self._retry.cancel()

    async def watch(self) -> AsyncIterator[control_pb2.TrafficPolicy]:
        """Yields the current policy and every later one. Slow watchers skip to the newest."""
        seen: control_pb2.TrafficPolicy | None = None
        with self._published.listener() as published:
            while True:
                published.clear()
                if seen is not self.current:
                    seen = self.current
                    yield seen
                else:
                    await published.wait()

    def _begin(self) -> None:
        known = read_policy(self._path) if self._path is not None else None
        if known is not None:
            policy, _ = self._of(self._store.snapshot())
            check_identity(known, policy.identity, str(self._path))
            differs = _content(known) != _content(policy)
            if known.version > policy.version or (known.version == policy.version and differs):
                logger.warning(
                    "policy %d was published before, and the database only knows %d: an older state of it was restored",
                    known.version,
                    policy.version,
                )
                self._outrun(known.version)
        self._publish(first=True)
        if not self._kept:
            self._retry_later()

    def _outrun(self, version: int) -> None:
        self._store.database.advance_policies(version)
        with self._lock:
            self._seen_elsewhere = max(self._seen_elsewhere, version)

    def _publish_or_retry(self) -> None:
        try:
            self._publish()
        except Exception:
            logger.exception("the policy cannot be published now; Routers go on with the one before")
            self._retry_later()

    def _retry_later(self) -> None:
        with self._lock:
            if self._unsubscribe is not None:
                self._retry = threading.Timer(RETRY_S, self._publish_or_retry)
                self._retry.daemon = True
                self._retry.start()

    def _publish(self, *, first: bool = False) -> None:
        """Publishes the database's policy if it differs from the published one. Thread-safe."""
        with self._lock:
            snapshot = self._store.snapshot()
            policy, digest = self._of(snapshot)
            current = self._current
            same = (
                current is not None and current.version > self._seen_elsewhere and _content(policy) == _content(current)
            )
            if same and self._kept:
                self._sequence = snapshot.sequence
                return
            try:
                self._keep(policy)
                self._kept = True
            except OSError as error:
                self._kept = False
                if not first:
                    raise
                logger.warning("the policy cannot be written to %s now: %s", self._path, error.strerror)
            self._current, self._digest, self._sequence = policy, digest, snapshot.sequence
        self._published.announce()

    def _of(self, snapshot: Snapshot) -> tuple[control_pb2.TrafficPolicy, str]:
        policy = TrafficPolicy.of(snapshot)
        return policy_to_proto(policy, self._version_of), policy.content_digest

    def _keep(self, policy: control_pb2.TrafficPolicy) -> None:
        if self._path is not None:
            write_policy(self._path, policy)


def _content(policy: control_pb2.TrafficPolicy) -> control_pb2.TrafficPolicy:
    """All fields except the version, which every history entry increases."""
    copy = control_pb2.TrafficPolicy()
    copy.CopyFrom(policy)
    copy.version = 0
    # A file of an older release has no identity; other identities were refused before.
    copy.identity = ""
    return copy
