"""What all replicas held at one time, as the controller observed it."""

import math
import time
from collections.abc import Collection, Hashable, Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from router.rollouts.background import Background
from router.rollouts.fleet import Fleet, ReplicaResidents
from router.rollouts.outcome import format_error
from router.rollouts.records import Snapshot

# How many replicas are polled at once; the others are polled on the next pass.
MAX_ASKED = 256


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """The observed state of one replica.

    Attributes:
        replica: its name.
        residents: the bundles that it holds; None if it did not answer.
        problem: why it did not answer, or "".
    """

    replica: str
    residents: ReplicaResidents | None
    problem: str = ""

    def holds(self, digest: str) -> bool:
        """Whether the replica is known to have loaded a bundle."""
        return self.residents is not None and digest in self.residents.bytes_by_digest


@dataclass(frozen=True, slots=True)
class OrganView:
    """The observed state of one organ's replicas.

    Attributes:
        organ: the organ.
        replicas: all replicas that should be serving.
        problem: why the replicas are not known, or "".
    """

    organ: str
    replicas: tuple[ReplicaView, ...]
    problem: str = ""

    def missing(self, digest: str) -> list[str]:
        """The replicas that are not known to hold a bundle."""
        return [view.replica for view in self.replicas if not view.holds(digest)]

    def resident_everywhere(self, digest: str) -> bool:
        """Whether there are replicas and all of them hold a bundle."""
        return bool(self.replicas) and not self.missing(digest)

    @property
    def empty(self) -> bool:
        """Whether no replica holds a bundle, so that a retired organ's application can be removed."""
        return not self.problem and all(
            view.residents is not None and not view.residents.bytes_by_digest for view in self.replicas
        )

    def settled(self, snapshot: Snapshot) -> bool:
        """Whether all replicas hold exactly what they should and no change is pending."""
        live = snapshot.live(self.organ)
        return (
            live is not None
            and snapshot.candidate(self.organ) is None
            and bool(self.replicas)
            and all(
                view.residents is not None
                and not view.residents.loading
                and set(view.residents.bytes_by_digest) - {snapshot.rollback_target(self.organ)} == {live.stable_digest}
                for view in self.replicas
            )
        )


class FleetObserver:
    """Polls all replicas concurrently, each with a timeout. Used by one thread at a time."""

    def __init__(self, fleet: Fleet, timeout_s: float) -> None:
        """`timeout_s` is how long a replica may take to answer."""
        self._fleet = fleet
        self._timeout_s = timeout_s
        self._calls = Background(MAX_ASKED)
        # Organ → when it was last polled, on the monotonic clock, and the answers.
        self._seen: dict[str, tuple[float, OrganView]] = {}

    def observe(
        self,
        snapshot: Snapshot,
        organs: Iterable[str],
        unloading: Collection[tuple[str, str]] = (),
        *,
        recent_s: float = 0.0,
    ) -> dict[str, OrganView]:
        """Polls the replicas of these organs; skips organs without changes if their last status is recent.

        Args:
            snapshot: the state of the rollouts.
            organs: the organs.
            unloading: (replica, digest) of running unloads, which a replica may still report.
            recent_s: how old the status of a settled organ may be; 0 polls all.
        """
        now = time.monotonic()
        spared = {}
        asked = []
        for organ in organs:
            when, view = self._seen.get(organ, (-math.inf, None))
            if view is not None and now - when < recent_s and view.settled(snapshot) and self._is_complete(view):
                spared[organ] = view
            else:
                asked.append(organ)
        return {**spared, **self._ask(asked, unloading)}

    def _is_complete(self, view: OrganView) -> bool:
        try:
            return list(self._fleet.replicas(view.organ)) == [replica.replica for replica in view.replicas]
        except Exception:
            # The call that needs the replica reports the error.
            return False

    def _ask(self, organs: Iterable[str], unloading: Collection[tuple[str, str]]) -> dict[str, OrganView]:
        self._calls.take_done()
        names: dict[str, list[str]] = {}
        problems: dict[str, str] = {}
        asked: dict[tuple[str, str], Future[Any]] = {}
        for organ in organs:
            try:
                names[organ] = list(self._fleet.replicas(organ))
            except Exception as error:
                names[organ], problems[organ] = [], f"its replicas cannot be listed: {format_error(error)}"
            for replica in names[organ]:
                key: Hashable = (replica, organ)
                if future := self._calls.start(key, partial(self._fleet.resident, replica, organ)):
                    asked[replica, organ] = future
        wait(asked.values(), timeout=self._timeout_s)
        views = {
            organ: OrganView(
                organ,
                tuple(_view_of(replica, asked.get((replica, organ)), unloading) for replica in replicas),
                problems.get(organ, ""),
            )
            for organ, replicas in names.items()
        }
        now = time.monotonic()
        self._seen.update({organ: (now, view) for organ, view in views.items()})
        return views


def _view_of(replica: str, future: Future[Any] | None, unloading: Collection[tuple[str, str]]) -> ReplicaView:
    if future is None or not future.done():
        return ReplicaView(replica, None, "does not answer")
    if error := future.exception():
        return ReplicaView(replica, None, format_error(error))
    residents: ReplicaResidents = future.result()
    held: Mapping[str, int] = {
        digest: size for digest, size in residents.bytes_by_digest.items() if (replica, digest) not in unloading
    }
    return ReplicaView(replica, replace(residents, bytes_by_digest=held))
