"""Which systems this user runs on this machine, so that another shell can find and stop them.

One small file per running `echoray serve`, in a folder that only its user can read.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class LocalSystem:
    """A running `echoray serve`.

    Attributes:
        created: when its process started; tells it from a later process with the same id.
        name: of the system; "" is the default one.
        address: of the Ray cluster that it joined; "" where it has a Ray of its own.
        gateway: where clients reach it. Both addresses are the configured ones until the system is ready.
    """

    pid: int
    created: float
    checkpoint: str
    control: str
    name: str = ""
    address: str = ""
    gateway: str = ""

    @property
    def process(self) -> psutil.Process | None:
        """Its process, or None when it has ended."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


@contextmanager
def announced(checkpoint: str, control: str, gateway: str, *, name: str = "", address: str = "") -> Iterator[None]:
    """Lets this process be found by `running_systems` while the block lasts."""
    system = LocalSystem(os.getpid(), psutil.Process().create_time(), checkpoint, control, name, address, gateway)
    path = _folder() / f"{system.pid}.json"
    path.touch(0o600)
    path.write_text(json.dumps(asdict(system)))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def claimed(resources: Mapping[str, str]) -> Iterator[None]:
    """Keeps for this process, while the block lasts, what two systems of this machine cannot share.

    Two that start at once would both find it free, and one of them would fail later, in another process.

    Args:
        resources: what each is called, for example "port 50051", and how the user gives another one.

    Raises:
        ValueError: another `echoray serve` of this user has it; the text names that process.
    """
    from echovlm_ray.serving.rollout_files import holder_of, note_holder

    with ExitStack() as held:
        for resource, remedy in resources.items():
            name = hashlib.sha256(resource.encode()).hexdigest()[:16]
            descriptor = os.open(_folder() / f"{name}.claim", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            held.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = holder_of(descriptor)
                raise ValueError(
                    f"another `echoray serve` (process {pid}) is starting or running here with {resource}: "
                    f"`echoray stop --pid {pid}` ends it; or {remedy}"
                ) from None
            note_holder(descriptor)
        yield


def ready_at(pid: int, control: str, gateway: str) -> None:
    """Notes where an announced system listens, which the configuration may leave to the system."""
    path = _folder() / f"{pid}.json"
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text())
        path.write_text(json.dumps({**known, "control": control, "gateway": gateway}))


def running_systems() -> list[LocalSystem]:
    """The systems that run now; files that a killed one left behind are removed."""
    systems = []
    for path in sorted(_folder().glob("*.json")):
        try:
            system = LocalSystem(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue
        if system.process is None:
            path.unlink(missing_ok=True)
        else:
            systems.append(system)
    return systems


def system_named(name: str) -> LocalSystem:
    """The running system of a name.

    Raises:
        ValueError: none, or several, have it.
    """
    found = [system for system in running_systems() if system.name == name]
    if len(found) == 1:
        return found[0]
    others = ", ".join(sorted({system.name for system in running_systems() if system.name})) or "none has a name"
    what = "several systems" if found else "no system"
    raise ValueError(f"{what} of yours on this machine have the name {name!r} ({others}): name its address instead")


def _folder() -> Path:
    from experts.private_folder import runtime_folder

    return runtime_folder()
