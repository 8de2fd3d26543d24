"""Service discovery: how a replica finds the addresses of the other parts' replicas.

Every replica publishes the address of its gRPC server in Serve (`record_replica_metadata`), and Serve's controller
pushes the running replicas by long poll. A dead replica disappears after about a second, and its replacement appears as
soon as it listens. While the controller is unavailable the last known addresses are used.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from echovlm_ray.serving.cluster import ray_internals
from echovlm_ray.serving.cluster.ray_internals import UnsupportedRayError
from echovlm_ray.serving.cluster.system_id import DEFAULT_SYSTEM, SystemId

logger = logging.getLogger(__name__)

# What a replica's metadata holds: where the other parts reach it, and where clients do if it has a public server too.
ADDRESS_KEY = "address"
PUBLIC_ADDRESS_KEY = "public_address"
# The replica's id in Serve, which no other replica ever gets.
REPLICA_KEY = "replica"
RETRY_S = 0.5


@dataclass(frozen=True, slots=True, order=True)
class ReplicaAddresses:
    """The addresses of one replica.

    Attributes:
        address: host:port for the other parts.
        public_address: host:port for clients; "" if the part has none.
        replica: the replica's id, which no other one ever gets.
    """

    address: str
    public_address: str = ""
    replica: str = ""


class Endpoints:
    """The live addresses of some deployments. Reading is cheap and thread-safe."""

    def __init__(self, deployments: Mapping[str, str], system: SystemId = DEFAULT_SYSTEM) -> None:
        """Takes part → name of its deployment, of one system; they need not run yet."""
        self._system = system
        self._deployments = dict(deployments)
        self._replicas: Mapping[str, tuple[ReplicaAddresses, ...]] = {}
        self._changed: list[Callable[[], None]] = []
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._watches_others = threading.Event()
        self._keys: dict[Any, str] = {}
        self._failure: UnsupportedRayError | None = None
        self._thread = threading.Thread(target=self._watch, name="endpoints", daemon=True)

    def start(self) -> None:
        """Starts to watch. Ray must be initialised, and Serve run.

        Raises:
            UnsupportedRayError: this Ray stores its deployments differently from the pinned version.
        """
        with self._lock:
            self._keys = self._keys_of(self._deployments)
        self._thread.start()

    def watch(self, deployments: Mapping[str, str]) -> None:
        """Watches further applications from now on; their addresses are here within a second. Allowed at any time.

        Args:
            deployments: application → name of its deployment; those that are watched already stay as they are.
        """
        with self._lock:
            new = {name: deployment for name, deployment in deployments.items() if name not in self._deployments}
            if not new:
                return
            self._deployments |= new
            if self._thread.is_alive():
                self._keys = self._keys | self._keys_of(new)
                self._watches_others.set()

    def stop(self) -> None:
        """Stops watching within half a second, because no call to Ray may be running when Ray is shut down."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def of(self, application: str) -> tuple[str, ...]:
        """The addresses of an application's replicas, host:port; none if it does not run.

        Raises:
            UnsupportedRayError: this Ray answers otherwise than the pinned one.
        """
        return tuple(replica.address for replica in self.replicas(application))

    def replicas(self, application: str) -> tuple["ReplicaAddresses", ...]:
        """All addresses of an application's replicas; see `of`."""
        if self._failure is not None:
            raise self._failure
        return self._replicas.get(application, ())

    def all(self) -> Mapping[str, tuple["ReplicaAddresses", ...]]:
        """All addresses of all applications that run."""
        return self._replicas

    def source(self, application: str) -> Callable[[], tuple[str, ...]]:
        """A function that returns the application's addresses whenever it is called."""
        return lambda: self.of(application)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Has `callback` called, on the watching thread, after every change; it must not block."""
        self._changed.append(callback)

    def wait_for(self, applications: Iterable[str], timeout_s: float) -> bool:
        """Waits until each of the applications has a replica; false if they have not in time."""
        deadline = time.monotonic() + timeout_s
        wanted = tuple(applications)
        while not all(self.of(application) for application in wanted):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return True

    def _keys_of(self, deployments: Mapping[str, str]) -> dict[Any, str]:
        return {
            ray_internals.target_key(self._system.application(part), deployment): part
            for part, deployment in deployments.items()
        }

    def _watch(self) -> None:
        # Below zero means: tell me whatever you have.
        snapshots: dict[Any, int] = {}
        while not self._stopping.is_set():
            self._watches_others.clear()
            keys = self._keys
            snapshots = {key: snapshots.get(key, -1) for key in keys}
            try:
                updates = ray_internals.wait_for_targets(snapshots, self._must_ask_again)
            except UnsupportedRayError as error:
                self._failure = error
                return
            except Exception as error:
                # The controller restarts, or this process is about to end.
                logger.debug("asking the Serve controller for endpoints again: %s", type(error).__name__)
                snapshots = {}
                self._stopping.wait(RETRY_S)
                continue
            replicas = dict(self._replicas)
            for key, (snapshot, metadata) in updates.items():
                snapshots[key] = snapshot
                replicas[keys[key]] = tuple(sorted(_addresses(entry) for entry in metadata if ADDRESS_KEY in entry))
            if replicas != self._replicas:
                self._replicas = replicas
                for callback in self._changed:
                    callback()

    def _must_ask_again(self) -> bool:
        return self._stopping.is_set() or self._watches_others.is_set()


def addresses_now(application: str, deployment: str, timeout_s: float) -> tuple[str, ...]:
    """Where an application's replicas listen at this moment, to ask once; none if there is no answer in time.

    Args:
        application: the application.
        deployment: the name of its deployment.
        timeout_s: rounded up to half a second.
    """
    deadline = time.monotonic() + timeout_s
    try:
        key = ray_internals.target_key(application, deployment)
        updates = ray_internals.wait_for_targets({key: -1}, lambda: time.monotonic() >= deadline)
    except Exception as error:
        logger.debug("the Serve controller does not say where %s is: %s", application, type(error).__name__)
        return ()
    return tuple(_addresses(entry).address for _, found in updates.values() for entry in found if ADDRESS_KEY in entry)


def _addresses(metadata: Mapping[str, Any]) -> ReplicaAddresses:
    return ReplicaAddresses(metadata[ADDRESS_KEY], metadata.get(PUBLIC_ADDRESS_KEY, ""), metadata.get(REPLICA_KEY, ""))
