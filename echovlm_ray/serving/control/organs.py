"""Deploys the expert group of a new organ, and removes that of a retired one."""

import logging
import threading
from collections.abc import Callable, Mapping

from router.rollouts.fleet_view import OrganView
from router.rollouts.records import Snapshot
from router.rollouts.store import RolloutStore

logger = logging.getLogger(__name__)

PERIOD_S = 2.0


class OrganApplications:
    """A reconcile loop on a thread: each pass deploys missing applications and removes those that are not needed.

    Applications of organs that are live and not in flight are started with the system.
    """

    def __init__(
        self,
        store: RolloutStore,
        views: Callable[[], Mapping[str, OrganView]],
        deployed: Callable[[], set[str]],
        deploy: Callable[[str], None],
        remove: Callable[[str], None],
        watch: Callable[[str], None],
    ) -> None:
        """
        Args:
            store: the state.
            views: organ → the last observed state of its replicas.
            deployed: the organs with applications in Serve.
            deploy: deploys an organ's application.
            remove: removes an organ's application.
            watch: starts following the replicas of an organ's application.
        """
        self._store = store
        self._views = views
        self._deployed = deployed
        self._deploy = deploy
        self._remove = remove
        self._watch = watch
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="organs", daemon=True)
        self._unsubscribe = store.subscribe(self._wake.set)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends after the current pass."""
        self._unsubscribe()
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def pass_once(self) -> bool:
        """Runs one pass.

        Returns:
            Whether the applications are in the desired state.
        """
        snapshot = self._store.snapshot()
        for organ in snapshot.known_organs:
            self._watch(organ)
        # Querying Serve takes tens of milliseconds of CPU time. Live organs with replicas need no query; replicas of an
        # organ that is not live may be shutting down.
        missing = {
            rollout.organ
            for rollout in snapshot.in_flight
            if snapshot.live(rollout.organ) is None or not self._has_replicas(rollout.organ)
        }
        ended = _ended(snapshot)
        deployed = self._deployed() if missing or ended else set()
        for organ in sorted(missing - deployed):
            logger.info("starting the expert group of %s", organ)
            self._deploy(organ)
        leaving = ended & deployed
        for organ in sorted(leaving):
            view = self._views().get(organ)
            # The observation must be later than the retirement to show that the replicas are empty.
            if view is not None and view.empty:
                logger.info("ending the expert group of %s", organ)
                self._remove(organ)
        return not leaving

    def _has_replicas(self, organ: str) -> bool:
        view = self._views().get(organ)
        return view is not None and bool(view.replicas)

    def _run(self) -> None:
        settled = False
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                settled = self.pass_once()
            except Exception:
                logger.exception("the organs' applications are looked at again")
                settled = False
            self._wake.wait(None if settled else PERIOD_S)


def _ended(snapshot: Snapshot) -> set[str]:
    return (
        set(snapshot.known_organs)
        - {live.organ for live in snapshot.organs}
        - {rollout.organ for rollout in snapshot.in_flight}
    )
