"""The controller's interfaces: the replicas that hold experts, and a verifier of bundles.

Control implements `Fleet` over the replicas' gRPC services and `Verifier` over the registry. Every method is called
from threads, several at once, may block, and may be called again for what was done already.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class ReplicaLostError(RuntimeError):
    """A replica died or cannot be reached; the same call may succeed once it is back or replaced."""


@dataclass(frozen=True, slots=True)
class ReplicaResidents:
    """What a replica holds.

    Attributes:
        bytes_by_digest: bundles that can compute now → bytes of their weights.
        limit_bytes: what all of them together may take.
        loading: bundles under way → how far, from 0 to 1.
    """

    bytes_by_digest: Mapping[str, int]
    limit_bytes: int
    loading: Mapping[str, float] = field(default_factory=dict)


class Fleet(Protocol):
    """All replicas of all organs' expert groups. A replica's name is never used again for another process."""

    def replicas(self, organ: str) -> Sequence[str]:
        """The names of an organ's replicas that should be serving now; none if the organ is not deployed."""

    def resident(self, replica: str, organ: str) -> ReplicaResidents:
        """What a replica holds now.

        Raises:
            Exception: it cannot be asked now; it is asked again.
        """

    def load(self, replica: str, organ: str, digest: str, timeout_s: float) -> None:
        """Makes a bundle resident; returns when it can compute. A bundle that is resident already is left alone.

        Raises:
            ReplicaLostError: the replica died or cannot be reached.
            ExpertCapacityError: no room.
            Exception: the bundle cannot be loaded; the text says why and holds no patient's data.
        """

    def unload(self, replica: str, organ: str, digest: str) -> None:
        """Unloads a bundle; returns when its memory is free. An absent bundle is left alone."""

    def load_bytes(self, organ: str, digest: str) -> int:
        """The memory that a load takes on a replica, as far as it is known before: for dry runs.

        Raises:
            UnknownBundleError: there is no such bundle.
        """

    def pinned(self) -> Collection[str]:
        """The digests that Routers still use.

        Of every Router: all digests of the policy that it applies now, and of the expert sets of requests under way. A
        Router that has not yet taken up the newest policy therefore still names what it would give new requests.

        Raises:
            Exception: some Router cannot be asked and may be alive, or has no policy yet; nothing is unloaded for now.
        """


class Verifier(Protocol):
    """Judges bundles before they are loaded."""

    def verify(self, organ: str, digest: str) -> None:
        """Reads all of a bundle and checks it: files, shapes, backbone, finite weights, self-test, signature.

        Raises:
            Exception: the bundle must not be used; the text says why.
        """
