"""Leases: bundles that replicas hold for replays, in addition to those of the rollouts.

They are in memory only: after a restart of Control there are none, and bundles without a use are unloaded.
"""

import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from router.gating.expert_set import ExpertSet, ExpertSetMember


@dataclass(eq=False, slots=True)
class Lease:
    """A lease of a past expert set on its bundles.

    Attributes:
        expert_set: the expert set.
        members: the members that are loaded for the lease.
        ready: whether every replica holds them, so that requests may use the set.
    """

    expert_set: ExpertSet
    members: tuple[ExpertSetMember, ...]
    ready: bool = False


class Leases:
    """All current leases. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leases: list[Lease] = []

    def take(self, expert_set: ExpertSet, organs: Collection[str]) -> Lease:
        """Takes a lease on the bundles of some of a set's organs. Does not load them."""
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
        """The leased bundles of an organ."""
        return frozenset(member.bundle_digest for member in self._members() if member.organ == organ)

    def ready_set(self, expert_set_id: str) -> ExpertSet | None:
        """The expert set of this id, if its lease is ready."""
        with self._lock:
            found = (lease.expert_set for lease in self._leases if lease.ready)
            return next((expert_set for expert_set in found if expert_set.id == expert_set_id), None)

    def _members(self) -> Iterable[ExpertSetMember]:
        with self._lock:
            return [member for lease in self._leases for member in lease.members]
