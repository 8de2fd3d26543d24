"""Leases: bundles that replicas keep for replays, beside those of the rollouts.

Held in memory alone: after a restart of Control there are none, and what replicas hold without need is unloaded.
"""

import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from router.gating.expert_set import ExpertSet, ExpertSetMember


@dataclass(eq=False, slots=True)
class Lease:
    """A past set's hold on its bundles.

    Attributes:
        expert_set: the set.
        members: those of its members that are loaded for it.
        ready: whether every replica holds them, so that requests may use the set.
    """

    expert_set: ExpertSet
    members: tuple[ExpertSetMember, ...]
    ready: bool = False


class Leases:
    """All that are held now. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leases: list[Lease] = []

    def take(self, expert_set: ExpertSet, organs: Collection[str]) -> Lease:
        """Has the bundles of some of a set's organs kept from now on; they are not loaded by that."""
        members = tuple(member for member in expert_set.members if member.organ in organs)
        lease = Lease(expert_set, members)
        with self._lock:
            self._leases.append(lease)
        return lease

    def release(self, lease: Lease) -> None:
        """Ends a lease."""
        with self._lock:
            self._leases.remove(lease)

    def digests(self, organ: str) -> frozenset[str]:
        """The bundles of an organ that are kept."""
        return frozenset(member.bundle_digest for member in self._members() if member.organ == organ)

    def ready_set(self, expert_set_id: str) -> ExpertSet | None:
        """The set of an id, if a lease of it is ready."""
        with self._lock:
            found = (lease.expert_set for lease in self._leases if lease.ready)
            return next((expert_set for expert_set in found if expert_set.id == expert_set_id), None)

    def _members(self) -> Iterable[ExpertSetMember]:
        with self._lock:
            return [member for lease in self._leases for member in lease.members]
