"""A clock, digests, and a fleet whose replicas are folders and whose weights are files."""

import hashlib
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from experts.errors import ExpertCapacityError, UnknownBundleError
from router.gating.expert_set import ExpertSet, ExpertSetMember, Routing
from router.rollouts.controller import RolloutController
from router.rollouts.fleet import ReplicaLostError, ReplicaResidents
from router.rollouts.fleet_view import OrganView
from router.rollouts.gates import Evaluator
from router.rollouts.health import HealthMonitor
from router.rollouts.history import Entry
from router.rollouts.leases import Leases
from router.rollouts.settings import RolloutSettings, Thresholds
from router.rollouts.store import RolloutStore
from tests.waiting import until


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def set_of(routing: Routing = "organs", **organs: str) -> ExpertSet:
    """A set by organ and the name of its bundle."""
    members = tuple(ExpertSetMember(organ=organ, bundle_digest=digest(name)) for organ, name in organs.items())
    return ExpertSet(backbone_digest="f" * 64, routing=routing, members=members)


class Clock:
    """Stands until it is moved. Called, it is the wall clock, which can also be set."""

    def __init__(self) -> None:
        self.passed = 0.0
        self.offset = 1_700_000_000.0

    def __call__(self) -> float:
        return self.offset + self.passed

    def monotonic(self) -> float:
        return self.passed

    def move(self, seconds: float) -> None:
        """Lets time pass."""
        self.passed += seconds

    def set(self, seconds: float) -> None:
        """Sets the wall clock forward or back; no time passes."""
        self.offset += seconds


class FolderFleet:
    """Stores bundles as files: `registry/<name>`, and `<organ>/<replica>/<digest>` for resident ones.

    Loading copies the file and checks its digest against its content; so it can run out of room, and find damage. It
    outlives the process that uses it.
    """

    def __init__(self, root: Path, limit_bytes: int = 1000) -> None:
        self.root = root
        self.limit_bytes = limit_bytes
        self.pins: set[str] | None = set()
        self.loads: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        (root / "registry").mkdir(parents=True, exist_ok=True)

    def push(self, name: str, size: int = 100, content: bytes | None = None) -> str:
        """Adds a bundle; its digest is of the content that it should have."""
        right = name.encode().ljust(size, b".")
        key = hashlib.sha256(right).hexdigest()
        (self.root / "registry" / key).write_bytes(right if content is None else content)
        return key

    def add_replica(self, organ: str, replica: str, *digests: str) -> None:
        folder = self.root / organ / replica
        folder.mkdir(parents=True)
        for key in digests:
            self.load(replica, organ, key, 1.0)

    def remove_replica(self, organ: str, replica: str) -> None:
        folder = self.root / organ / replica
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()

    def content(self, key: str) -> bytes:
        path = self.root / "registry" / key
        if not path.exists():
            raise UnknownBundleError(f"no bundle {key[:12]}")
        return path.read_bytes()

    def replicas(self, organ: str) -> Sequence[str]:
        folder = self.root / organ
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    def resident(self, replica: str, organ: str) -> ReplicaResidents:
        return ReplicaResidents(self._held(replica, organ), self.limit_bytes)

    def load(self, replica: str, organ: str, digest: str, timeout_s: float) -> None:
        folder = self._folder(replica, organ)
        self.loads.append((replica, digest))
        content = self.content(digest)
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"bundle {digest[:12]}: damaged")
        with self._lock:
            if (folder / digest).exists():
                return
            held = sum(self._held(replica, organ).values())
            if held + len(content) > self.limit_bytes:
                raise ExpertCapacityError(f"{held + len(content)} bytes are above the limit {self.limit_bytes}")
            part = folder / f"{digest}.part"
            part.write_bytes(content)
            self.written(replica)
            part.rename(folder / digest)

    def unload(self, replica: str, organ: str, digest: str) -> None:
        (self._folder(replica, organ) / digest).unlink(missing_ok=True)

    def load_bytes(self, organ: str, digest: str) -> int:
        return len(self.content(digest))

    def pinned(self) -> Collection[str]:
        if self.pins is None:
            raise RuntimeError("a router does not answer")
        return self.pins

    def held(self, organ: str) -> dict[str, set[str]]:
        return {replica: set(self._held(replica, organ)) for replica in self.replicas(organ)}

    def written(self, replica: str) -> None:
        """Comes when a load is nearly done."""

    def _held(self, replica: str, organ: str) -> dict[str, int]:
        held = {}
        for path in self._folder(replica, organ).iterdir():
            # An unload may be under way.
            with suppress(FileNotFoundError):
                if path.suffix != ".part":
                    held[path.name] = path.stat().st_size
        return held

    def _folder(self, replica: str, organ: str) -> Path:
        folder = self.root / organ / replica
        if not folder.exists():
            raise ReplicaLostError(f"replica {replica} is gone")
        return folder


class DigestVerifier:
    """Reads a bundle of a `FolderFleet` and checks its digest."""

    def __init__(self, fleet: FolderFleet) -> None:
        self.fleet = fleet

    def verify(self, organ: str, digest: str) -> None:
        if hashlib.sha256(self.fleet.content(digest)).hexdigest() != digest:
            raise ValueError("the bundle is not what its digest says")


# Steps end and promotions last without any request; what is about evidence has settings of its own.
QUICK = RolloutSettings(
    period_s=0.02,
    status_timeout_s=0.5,
    loss_pause_s=0,
    thresholds=Thresholds(min_successes=0),
    watch_after_promotion_s=0,
)


def controller_of(
    store: RolloutStore,
    fleet: FolderFleet,
    settings: RolloutSettings = QUICK,
    monitor: HealthMonitor | None = None,
    verifier: object | None = None,
    leases: Leases | None = None,
    evaluator: Evaluator | None = None,
) -> RolloutController:
    judge = verifier or DigestVerifier(fleet)
    clock = store.clock.monotonic if isinstance(store.clock, Clock) else time.monotonic
    watched = monitor or HealthMonitor(clock)
    return RolloutController(store, fleet, judge, settings, watched, leases, evaluator)  # type: ignore[arg-type]


def reconcile_until(
    controller: RolloutController,
    done: Callable[[Mapping[str, OrganView]], bool],
    timeout_s: float = 10.0,
) -> None:
    """Passes until something is true."""
    until(lambda: done(controller.reconcile_once()), timeout_s=timeout_s)


def settle(controller: RolloutController, passes: int = 12) -> None:
    """Passes for as long as anything that was begun could need."""
    for _ in range(passes):
        controller.reconcile_once()
        time.sleep(0.003)


def actions(entries: Sequence[Entry]) -> list[str]:
    return [entry.action for entry in entries]
