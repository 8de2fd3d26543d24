"""What all replicas hold at one time."""

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

# Replicas asked at once; those above are asked the next time.
MAX_ASKED = 256


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica.

    Attributes:
        replica: its name.
        residents: what it holds; none if it did not say.
        problem: why it did not, or "".
    """

    replica: str
    residents: ReplicaResidents | None
    problem: str = ""

    def holds(self, digest: str) -> bool:
        """Whether it can compute with a bundle, as far as is known."""
        return self.residents is not None and digest in self.residents.bytes_by_digest


@dataclass(frozen=True, slots=True)
class OrganView:
    """The replicas of one organ.

    Attributes:
        organ: the organ.
        replicas: all that should be serving.
        problem: why the replicas are not known, or "".
    """

    organ: str
    replicas: tuple[ReplicaView, ...]
    problem: str = ""

    def missing(self, digest: str) -> list[str]:
        """The replicas that do not hold a bundle, as far as is known."""
        return [view.replica for view in self.replicas if not view.holds(digest)]

    def held_everywhere(self, digest: str) -> bool:
        """Whether there are replicas, and all of them hold a bundle."""
        return bool(self.replicas) and not self.missing(digest)

    @property
    def empty(self) -> bool:
        """Whether no replica holds anything: a retired organ's application may be taken down then."""
        return not self.problem and all(
            view.residents is not None and not view.residents.bytes_by_digest for view in self.replicas
        )

    def settled(self, snapshot: Snapshot) -> bool:
        """Whether all replicas hold what they should and nothing else, and nothing of it is going to change."""
        live = snapshot.live(self.organ)
        return (
            live is not None
            and snapshot.candidate(self.organ) is None
            and bool(self.replicas)
            and all(
                view.residents is not None
                and not view.residents.loading
                and set(view.residents.bytes_by_digest) - {snapshot.kept(self.organ)} == {live.stable_digest}
                for view in self.replicas
            )
        )


class FleetObserver:
    """Polls all replicas concurrently, each with a timeout. Used by one thread at a time."""

    def __init__(self, fleet: Fleet, timeout_s: float) -> None:
        """Takes the fleet, and how long a replica may take to answer."""
        self._fleet = fleet
        self._timeout_s = timeout_s
        self._calls = Background(MAX_ASKED)
        # Organ → when it was asked about last, on the monotonic clock, and what its replicas said.
        self._seen: dict[str, tuple[float, OrganView]] = {}

    def observe(
        self,
        snapshot: Snapshot,
        organs: Iterable[str],
        unloading: Collection[tuple[str, str]] = (),
        *,
        recent_s: float = 0.0,
    ) -> dict[str, OrganView]:
        """What the replicas of these organs hold; those of organs that nothing happens to can be spared the question.

        Args:
            snapshot: the state of the rollouts.
            organs: the organs.
            unloading: (replica, digest) that are being unloaded: a replica may still name them, but not for long.
            recent_s: how old may be what is said here of an organ that had settled; 0 asks all.
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
            # Which one it is is said by the call that needs it.
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
