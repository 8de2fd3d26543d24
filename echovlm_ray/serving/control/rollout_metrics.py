"""Updates the metrics of rollouts from the database."""

import asyncio
import logging
from collections.abc import Callable

from echovlm_ray.serving.cluster.metrics import ControlMetrics
from echovlm_ray.serving.control.changes import Changes
from router.rollouts.store import RolloutStore

logger = logging.getLogger(__name__)

# Changes are announced at once. But Ray forgets a gauge that was not set for two of its reports, 20 s by default.
PERIOD_S = 5.0


class RolloutMetrics:
    """Reads the state whenever it changes. Made on the event loop on which it runs."""

    def __init__(self, store: RolloutStore, version_of: Callable[[str], str]) -> None:
        """
        Args:
            store: the state.
            version_of: digest → version.
        """
        self._store = store
        self._version_of = version_of
        self._metrics = ControlMetrics()
        self._changes = Changes()
        self._unsubscribe = store.subscribe(self._changes.announce)
        self._task = asyncio.get_running_loop().create_task(self._follow())

    def stop(self) -> None:
        self._unsubscribe()
        self._task.cancel()

    async def _follow(self) -> None:
        with self._changes.listener() as changed:
            while True:
                changed.clear()
                try:
                    await asyncio.to_thread(self._update)
                except Exception:
                    logger.exception("the metrics of rollouts could not be brought up to date")
                try:
                    async with asyncio.timeout(PERIOD_S):
                        await changed.wait()
                except TimeoutError:
                    continue

    def _update(self) -> None:
        with self._store.read() as transaction:
            snapshot = transaction.snapshot()
            rollouts = [
                rollout for organ in snapshot.known_organs for rollout in transaction.rollouts(organ=organ, limit=1)
            ]
        self._metrics.update(
            {live.organ: self._version(live.stable_digest) for live in snapshot.organs},
            [
                (rollout.organ, self._version(rollout.digest), str(rollout.state), rollout.percent or 0.0)
                for rollout in rollouts
            ],
        )

    def _version(self, digest: str) -> str:
        return self._version_of(digest) or digest[:12]
