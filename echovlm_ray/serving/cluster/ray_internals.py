"""All uses of Ray beyond its public interface, as of Ray 2.60.

Serve's public Python interface cannot list the running replicas with their metadata, nor give a deployment a version,
and Ray's public options turn 127.0.0.1 into the machine's own address. These are done here and nowhere else. Results
are checked, so that another version of Ray fails with a clear error; tests/serving/cluster/test_ray_internals.py names
each part that this module needs.
"""

import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray.serve import Deployment

if TYPE_CHECKING:
    from ray.actor import ActorHandle

# The namespace of this project's entries in the cluster's key-value store.
RECORDS = "echovlm"
TIMEOUT_S = 60.0
# The controller itself answers a poll without news after a minute.
POLL_TIMEOUT_S = 90.0
# Ray's processes read it.
_CLUSTER_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

# The key of one deployment's targets in the controller's long poll.
TargetKey = Hashable


class UnsupportedRayError(RuntimeError):
    """Ray Serve's internals differ from those that this module supports."""


def target_key(application: str, deployment: str) -> TargetKey:
    """The name of a deployment's targets in `wait_for_targets`.

    Raises:
        UnsupportedRayError: this Ray stores them differently.
    """
    try:
        from ray.serve._private.common import DeploymentID
        from ray.serve._private.long_poll import LongPollNamespace

        return (LongPollNamespace.DEPLOYMENT_TARGETS, DeploymentID(name=deployment, app_name=application))
    except (ImportError, AttributeError, TypeError) as error:
        raise _unsupported() from error


def wait_for_targets(
    snapshots: Mapping[TargetKey, int], stopping: Callable[[], bool]
) -> dict[TargetKey, tuple[int, list[Mapping[str, Any]]]]:
    """Waits until the running replicas of a deployment are not those of the snapshot any more, at most a minute or so.

    Args:
        snapshots: what to watch, and the snapshot last seen of it; below zero for none.
        stopping: polled twice a second; true ends the wait without a result.

    Returns:
        for each deployment that changed, its new snapshot and what every running replica returned from
        `record_replica_metadata`; nothing when nothing changed.

    Raises:
        UnsupportedRayError: the answer has another shape.
        ray.exceptions.RayError: the controller is away.
    """
    pending: Any = _controller().listen_for_change.remote(dict(snapshots))
    deadline = time.monotonic() + POLL_TIMEOUT_S
    while not ray.wait([pending], timeout=0.5)[0]:
        if stopping() or time.monotonic() > deadline:
            return {}
    updates: Any = ray.get(pending)
    if not isinstance(updates, dict):
        return {}
    try:
        return {
            key: (
                int(update.snapshot_id),
                [replica.replica_metadata for replica in update.object_snapshot.running_replicas],
            )
            for key, update in updates.items()
        }
    except AttributeError as error:
        raise _unsupported() from error


def with_version(deployment: Deployment, version: str) -> Deployment:
    """The deployment with an explicit version; deploying the same version again does not restart its replicas.

    Raises:
        UnsupportedRayError: this Ray takes no versions.
    """
    try:
        return deployment.options(version=version, _internal=True)
    except (TypeError, ValueError) as error:
        raise _unsupported() from error


def delete_applications(names: Iterable[str]) -> None:
    """Starts the removal of applications by Serve, and does not wait for it."""
    ray.get(_controller().delete_apps.remote(list(names)), timeout=TIMEOUT_S)


def read_record(key: str) -> bytes | None:
    """The value of a key in the cluster's store, which lasts as long as the cluster."""
    value: bytes | None = _store()._internal_kv_get(key, namespace=RECORDS)
    return value


def write_record(key: str, value: bytes, *, replace: bool) -> bool:
    """Keeps something under a key; without `replace`, only if nothing is there.

    Returns:
        Whether it was written.
    """
    there: bool = _store()._internal_kv_put(key, value, overwrite=replace, namespace=RECORDS)
    return replace or not there


def delete_record(key: str) -> None:
    """Deletes the record of a key."""
    _store()._internal_kv_del(key, namespace=RECORDS)


def record_keys() -> list[str]:
    """All keys in the store."""
    return [key.decode() for key in _store()._internal_kv_list(b"", namespace=RECORDS)]


@contextmanager
def on_loopback() -> Iterator[None]:
    """Starts Ray on loopback only. The block must last as long as that Ray.

    On macOS and Windows, where Ray runs no clusters, it uses loopback for everything. The same switch, with the
    variable of its processes, does so on Linux.

    Raises:
        UnsupportedRayError: this Ray has no such switch.
    """
    try:
        from ray._private import ray_constants

        constant = ray_constants.ENABLE_RAY_CLUSTER
    except (ImportError, AttributeError) as error:
        raise _unsupported() from error
    variable = os.environ.get(_CLUSTER_VARIABLE)
    os.environ[_CLUSTER_VARIABLE] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        if variable is None:
            del os.environ[_CLUSTER_VARIABLE]
        else:
            os.environ[_CLUSTER_VARIABLE] = variable


def _store() -> Any:
    try:
        from ray.experimental import internal_kv
    except ImportError as error:
        raise _unsupported() from error
    return internal_kv


def _controller() -> "ActorHandle[Any]":
    try:
        from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
    except ImportError as error:
        raise _unsupported() from error
    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)


def _unsupported() -> UnsupportedRayError:
    return UnsupportedRayError(
        f"Ray {ray.__version__} works otherwise inside than 2.60, for which "
        "echovlm_ray.serving.cluster.ray_internals is written: install the pinned version"
    )
