"""Whether replicas have memory for the bundles of a replay, in addition to those of the rollouts."""

from collections.abc import Iterable

from experts.errors import ExpertCapacityError, UnknownBundleError
from router.gating.expert_set import ExpertSetMember
from router.rollouts.fleet import Fleet, ReplicaResidents
from router.rollouts.records import Snapshot
from router.rollouts.states import RESIDENT


def missing_bundles(fleet: Fleet, members: Iterable[ExpertSetMember]) -> list[tuple[str, ExpertSetMember]]:
    """(replica, member) of the bundles that a replica of their organ does not hold. Raises what `Fleet` raises."""
    return [
        (replica, member)
        for member in members
        for replica in fleet.replicas(member.organ)
        if member.bundle_digest not in fleet.resident(replica, member.organ).bytes_by_digest
    ]


def memory_shortage(fleet: Fleet, snapshot: Snapshot, missing: Iterable[tuple[str, ExpertSetMember]]) -> str:
    """The memory that must be freed before past versions can be loaded, as text; "" if there is enough.

    Args:
        fleet: the replicas.
        snapshot: the rollouts. Memory is reserved for the stable version, the rollback target if it is loaded, and a
            candidate, also before it is loaded.
        missing: (replica, past version to load).

    Raises:
        ExpertCapacityError: the memory would not suffice without other replays; the text names the limit.
        Exception: see `Fleet`.
    """
    for replica, member in missing:
        organ, residents = member.organ, fleet.resident(replica, member.organ)
        needed = fleet.load_bytes(organ, member.bundle_digest)
        staying = _staying(fleet, snapshot, organ, residents)
        held = {digest: fleet.load_bytes(organ, digest) for digest in residents.loading}
        held.update(residents.bytes_by_digest)
        passing = sum(size for digest, size in held.items() if digest not in {*staying, member.bundle_digest})
        limit = residents.limit_bytes
        if sum(staying.values()) + needed > limit:
            raise ExpertCapacityError(
                f"replica {replica} of {organ!r} has no room for a past version: it needs {needed} bytes, what is "
                f"served and kept takes {sum(staying.values())}, and the limit is {limit} "
                "(experts.max_resident_bytes): raise it, or wait until the rollout under way has ended"
            )
        if sum(staying.values()) + passing + needed > limit:
            return (
                f"replica {replica} of {organ!r} holds {passing} bytes for other replays or requests under way, and "
                f"{needed} more are above the limit of {limit} bytes (experts.max_resident_bytes)"
            )
    return ""


def _staying(fleet: Fleet, snapshot: Snapshot, organ: str, residents: ReplicaResidents) -> dict[str, int]:
    """Digest → bytes of the bundles that a replica holds or will hold for the rollouts."""
    live, candidate, kept = snapshot.live(organ), snapshot.candidate(organ), snapshot.rollback_target(organ)
    wanted = [live.stable_digest] if live is not None else []
    if candidate is not None and candidate.state in RESIDENT:
        wanted.append(candidate.digest)
    if kept is not None and kept in residents.bytes_by_digest:
        wanted.append(kept)
    sizes = {}
    for digest in wanted:
        try:
            sizes[digest] = residents.bytes_by_digest.get(digest) or fleet.load_bytes(organ, digest)
        except UnknownBundleError:
            # It cannot be loaded; its rollout reports that.
            continue
    return sizes
