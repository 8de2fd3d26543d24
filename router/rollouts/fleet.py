"""The controller's interfaces: the replicas that hold experts, and a verifier of bundles.

Control implements `Fleet` over the replicas' gRPC services and `Verifier` over the registry. Every method is called
from several threads, may block, and must be idempotent.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class ReplicaLostError(RuntimeError):
    """A replica died or cannot be reached; the same call may succeed once it is back or replaced."""


@dataclass(frozen=True, slots=True)
class ReplicaResidents:
    """The bundles on a replica.

    Attributes:
        bytes_by_digest: loaded bundles → bytes of their weights.
        limit_bytes: the limit for all of them together.
        loading: bundles that are being loaded → progress from 0 to 1.
    """

    bytes_by_digest: Mapping[str, int]
    limit_bytes: int
    loading: Mapping[str, float] = field(default_factory=dict)


class Fleet(Protocol):
    """All replicas of all organs' expert groups. The name of a replica is never reused."""

    def replicas(self, organ: str) -> Sequence[str]:
        """The names of an organ's replicas that should be serving; empty if the organ is not deployed."""

    def resident(self, replica: str, organ: str) -> ReplicaResidents:
        """The bundles on a replica now.

        Raises:
            Exception: the replica does not answer; the caller retries.
        """

    def load(self, replica: str, organ: str, digest: str, timeout_s: float) -> None:
        """Loads a bundle and returns when it can compute. Does nothing if it is loaded already.

        Raises:
            ReplicaLostError: the replica died or cannot be reached.
            ExpertCapacityError: the memory limit does not allow it.
            Exception: the bundle cannot be loaded; the text says why and holds no patient's data.
        """

    def unload(self, replica: str, organ: str, digest: str) -> None:
        """Unloads a bundle and returns when its memory is free. Does nothing if it is not loaded."""

    def load_bytes(self, organ: str, digest: str) -> int:
        """Estimates the memory that a load takes on a replica, in bytes; for dry runs.

        Raises:
            UnknownBundleError: there is no such bundle.
        """

    def pinned(self) -> Collection[str]:
        """The digests that Routers use.

        For every Router: all digests of the policy that it applies, and of the expert sets of running requests. A
        Router that does not apply the newest policy yet still reports the digests that new requests may get from it.

        Raises:
            Exception: a Router does not answer but may be alive, or has no policy yet; then nothing is unloaded.
        """


class Verifier(Protocol):
    """Verifies bundles before they are loaded."""

    def verify(self, organ: str, digest: str) -> None:
        """Reads all of a bundle and checks it: files, shapes, backbone, finite weights, self-test, signature.

        Raises:
            Exception: the bundle must not be used; the text says why.
        """
