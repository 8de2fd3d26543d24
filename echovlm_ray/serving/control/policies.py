"""The policy that Routers apply: read after every change of the database, kept in a file, and told to who watches."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from echovlm_ray.serving.control.changes import Changes
from echovlm_ray.serving.control.messages import VersionOf, policy_to_proto
from echovlm_ray.serving.known_policy import write_policy
from protos import control_pb2
from router.rollouts.store import RolloutStore

logger = logging.getLogger(__name__)

RETRY_S = 1.0


class PolicyPublisher:
    """Belongs to one event loop. Nobody hears of a policy before it stands in the file."""

    def __init__(self, store: RolloutStore, version_of: VersionOf, path: Path | None) -> None:
        """Takes where the state is, digest → version, and the file; None keeps none."""
        self._store = store
        self._version_of = version_of
        self._path = path
        self._changed = Changes()
        self._published = Changes()
        self._task: asyncio.Task[None] | None = None
        self._current: control_pb2.TrafficPolicy | None = None
        self._unsubscribe = store.subscribe(self._changed.announce)

    @property
    def current(self) -> control_pb2.TrafficPolicy:
        """The policy now, once started."""
        assert self._current is not None
        return self._current

    async def start(self) -> None:
        """Publishes the first policy, then goes on by itself.

        Raises:
            RolloutStateError: there is no live set yet.
            OSError: the file cannot be written.
        """
        self._current = await asyncio.to_thread(self._read)
        await asyncio.to_thread(self._keep, self._current)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Ends."""
        self._unsubscribe()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

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

    async def _run(self) -> None:
        with self._changed.listener() as changed:
            # What changed between the first reading and now would otherwise be missed.
            changed.set()
            while True:
                await changed.wait()
                changed.clear()
                try:
                    policy = await asyncio.to_thread(self._read)
                    if _content(policy) == _content(self.current):
                        continue
                    await asyncio.to_thread(self._keep, policy)
                except Exception:
                    logger.exception("the policy cannot be published now; Routers go on with the one before")
                    await asyncio.sleep(RETRY_S)
                    changed.set()
                    continue
                self._current = policy
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
