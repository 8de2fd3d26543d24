"""The outcome of an operation, or of its dry run."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from router.rollouts.fleet import Fleet
from router.rollouts.records import Rollout


@dataclass(frozen=True, slots=True)
class ReplicaMemory:
    """What loading a candidate takes of one replica's memory.

    Attributes:
        resident_bytes: bytes in use now.
        needed_bytes: bytes that loading adds; 0 if the candidate is loaded already.
        limit_bytes: the replica's limit.
        problem: why the numbers are unknown, or "".
    """

    replica: str
    resident_bytes: int
    needed_bytes: int
    limit_bytes: int
    problem: str = ""

    @property
    def fits(self) -> bool:
        """Whether the candidate can be loaded."""
        return not self.problem and self.resident_bytes + self.needed_bytes <= self.limit_bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of an operation.

    Attributes:
        organ: the organ.
        changed: whether anything was changed, or would be in a dry run.
        steps: the steps that follow, as text.
        rollout: the rollout after the operation; None for a dry run of staging, and for retiring.
        memory: for dry runs that lead to a load, the memory of every replica.
    """

    organ: str
    changed: bool
    steps: tuple[str, ...]
    rollout: Rollout | None = None
    memory: tuple[ReplicaMemory, ...] = ()


def memory_plan(fleet: Fleet, organ: str, digest: str, spare: str | None = None) -> tuple[ReplicaMemory, ...]:
    """The memory that loading a bundle takes on every replica of an organ.

    Args:
        fleet: the replicas.
        organ: the organ.
        digest: the bundle.
        spare: a bundle that is evicted where memory is short.

    Raises:
        UnknownBundleError: there is no such bundle.
    """
    load_bytes = fleet.load_bytes(organ, digest)
    return tuple(_memory_of(fleet, replica, organ, digest, load_bytes, spare) for replica in fleet.replicas(organ))


def _memory_of(
    fleet: Fleet, replica: str, organ: str, digest: str, load_bytes: int, spare: str | None
) -> ReplicaMemory:
    try:
        residents = fleet.resident(replica, organ)
    except Exception as error:
        return ReplicaMemory(replica, 0, load_bytes, 0, f"does not answer: {format_error(error)}")
    held = residents.bytes_by_digest
    needed = 0 if digest in held else load_bytes
    memory = ReplicaMemory(replica, sum(held.values()), needed, residents.limit_bytes)
    if memory.fits or spare is None or spare == digest:
        return memory
    return replace(memory, resident_bytes=memory.resident_bytes - held.get(spare, 0))


def format_error(error: BaseException) -> str:
    """An exception in one line, for the history."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


def not_resident(fleet: Fleet, organ: str, digest: str) -> str:
    """Why a bundle cannot get requests now, as text; "" if every replica of the organ holds it."""
    replicas = fleet.replicas(organ)
    if not replicas:
        return f"no replica of {organ!r} is running"
    missing = [replica for replica in replicas if not _holds(fleet, replica, organ, digest)]
    return f"it is not loaded on {listed(missing)} of {len(replicas)} replicas" if missing else ""


def _holds(fleet: Fleet, replica: str, organ: str, digest: str) -> bool:
    try:
        return digest in fleet.resident(replica, organ).bytes_by_digest
    except Exception:
        return False


def listed(names: Iterable[str]) -> str:
    """Names as a list in text; of many only the first few."""
    names = list(names)
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
