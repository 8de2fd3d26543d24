"""The systems of a Ray cluster by name, with their owners, in the cluster's key-value store.

A name belongs to one system at a time. `echoray serve` claims it before anything is deployed and releases it when the
applications are removed. A system that finds another record than its own under its name has been replaced, and touches
nothing any more.
"""

import json
import os
import socket
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime

import psutil

from echovlm_ray.config import Config
from echovlm_ray.serving.cluster import ray_internals
from echovlm_ray.serving.cluster.system_id import SystemId

_PREFIX = "system/"
TAKE_OVER = "To replace it on purpose add --take-over; to run beside it give another --name and rollouts.database"


class OwnedByAnotherError(RuntimeError):
    """A name or a port on a cluster belongs to another system. The text names it and the options."""


@dataclass(frozen=True, slots=True)
class SystemRecord:
    """One system on a cluster.

    Attributes:
        run: unique to each `echoray serve`.
        pid: of the process that runs it.
        created: when that process started, in seconds since 1970.
        started: when the name was claimed.
        attached: whether the system ends with that process.
        ports: where clients and operators reach it; those that the system chooses are left out.
    """

    name: str
    identity: str
    run: str
    host: str
    pid: int
    created: float
    started: str
    attached: bool
    ports: tuple[int, ...]

    @classmethod
    def of_this_process(cls, system: SystemId, config: Config, *, attached: bool) -> "SystemRecord":
        """The record of a system that this process is about to start."""
        process = psutil.Process(os.getpid())
        ports = tuple(port for port in (config.gateway.port, config.control.port) if port)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(
            system.name,
            system.identity,
            uuid.uuid4().hex,
            socket.gethostname(),
            process.pid,
            process.create_time(),
            started,
            attached,
            ports,
        )

    @property
    def system(self) -> SystemId:
        """Which system it is."""
        return SystemId(self.name, self.identity)

    @property
    def owner(self) -> str:
        """Who runs it, in words."""
        left = "" if self.attached else ", left running"
        return f"process {self.pid} on {self.host}, started {self.started}{left}"

    @property
    def has_ended(self) -> bool:
        """Whether its process is known to have ended; of another machine's nothing is known."""
        if self.host != socket.gethostname():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.created) > 1.0
        except psutil.NoSuchProcess:
            return True


def record_of(name: str) -> SystemRecord | None:
    """Who has a name on the cluster that this process is connected to."""
    return _parsed(ray_internals.read_record(_key(name)))


def all_records() -> Mapping[str, SystemRecord]:
    """Name → system, of the whole cluster."""
    found = {
        key: _parsed(ray_internals.read_record(key)) for key in ray_internals.record_keys() if key.startswith(_PREFIX)
    }
    return {record.name: record for record in found.values() if record is not None}


def claim(record: SystemRecord, *, deployed: bool, take_over: bool) -> SystemRecord | None:
    """Takes a name on the cluster.

    Args:
        record: of the system that requests it.
        deployed: whether applications of that name are on the cluster.
        take_over: whether another system's may be taken.

    Returns:
        The record before, if its system must be removed first: it is another deployment.

    Raises:
        OwnedByAnotherError: the name belongs to another system, or another system uses one of the ports.
    """
    _check_ports(record)
    before = record_of(record.name)
    if before is None:
        if deployed and not take_over:
            raise OwnedByAnotherError(
                f"the cluster runs {record.system} already, and nothing says who started it. {TAKE_OVER}"
            )
        if not ray_internals.write_record(_key(record.name), _encoded(record), replace=take_over):
            return claim(record, deployed=deployed, take_over=take_over)
        return replace(record, identity="") if deployed else None
    same = before.identity == record.identity
    runs = before.attached and not before.has_ended
    if not take_over and (runs or (deployed and not same)):
        what = "this deployment" if same else f"another deployment, {before.identity[:12]}…,"
        raise OwnedByAnotherError(
            f"the cluster runs {record.system} already, {what} by {before.owner}. {TAKE_OVER}; `echoray stop --address "
            "…` ends it"
        )
    ray_internals.write_record(_key(record.name), _encoded(record), replace=True)
    return before if deployed and not same else None


def check_database(record: SystemRecord, deployed: Callable[[SystemId], bool]) -> None:
    """Refuses a database that another system of the cluster uses: its identity is that system's.

    Args:
        record: of the system that starts.
        deployed: whether applications of a system are on the cluster.

    Raises:
        OwnedByAnotherError: names the other system.
    """
    for name, other in all_records().items():
        if name == record.name or other.identity != record.identity:
            continue
        if (other.attached and not other.has_ended) or deployed(other.system):
            option = f" --name {name}" if name else ""
            raise OwnedByAnotherError(
                f"{other.system} on this cluster, {other.owner}, uses the same rollouts' database: set "
                f"rollouts.database to another one, or end that system first (`echoray stop --address …{option}`)"
            )


def is_ours(record: SystemRecord) -> bool:
    """Whether the name still belongs to this run."""
    now = record_of(record.name)
    return now is not None and now.run == record.run


def release(record: SystemRecord) -> None:
    """Releases a name, unless another system has it by now."""
    if is_ours(record):
        ray_internals.delete_record(_key(record.name))


def release_name(name: str) -> None:
    """Releases a name, whichever system has it: its applications were removed."""
    ray_internals.delete_record(_key(name))


def _check_ports(record: SystemRecord) -> None:
    for name, other in all_records().items():
        shared = set(other.ports) & set(record.ports)
        if name != record.name and shared and not (other.attached and other.has_ended):
            raise OwnedByAnotherError(
                f"port {min(shared)} is used by {other.system} on this cluster, {other.owner}: set gateway.port and "
                "control.port to others, or to 0 for any free ones"
            )


def _key(name: str) -> str:
    return f"{_PREFIX}{name}"


def _encoded(record: SystemRecord) -> bytes:
    return json.dumps(asdict(record)).encode()


def _parsed(value: bytes | None) -> SystemRecord | None:
    if value is None:
        return None
    fields = json.loads(value)
    return SystemRecord(**{**fields, "ports": tuple(fields["ports"])})
