"""The list of this user's running local systems, so that another shell can find and stop them.

One small file for each running `echoray serve`, in a private folder.
"""

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
        created: when its process started, to distinguish it from a later process with the same id.
        name: the system's name; "" is the default.
        address: the address of its existing Ray cluster; "" for a local Ray.
        gateway: the address for clients. Both addresses are the configured ones until the system is ready.
        database: the file of its rollouts' database; "" if there is none.
    """

    pid: int
    created: float
    checkpoint: str
    control: str
    name: str = ""
    address: str = ""
    gateway: str = ""
    database: str = ""

    @property
    def process(self) -> psutil.Process | None:
        """Its process, or None if it has ended."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


@contextmanager
def announced(
    checkpoint: str, control: str, gateway: str, *, name: str = "", address: str = "", database: str = ""
) -> Iterator[None]:
    """Adds this process to `running_systems` within the block."""
    created = psutil.Process().create_time()
    system = LocalSystem(os.getpid(), created, checkpoint, control, name, address, gateway, database)
    path = _folder() / f"{system.pid}.json"
    path.touch(0o600)
    path.write_text(json.dumps(asdict(system)))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        _remove_folder_if_empty()


@contextmanager
def claimed(resources: Mapping[str, str]) -> Iterator[None]:
    """Locks resources that two local systems cannot share, within the block.

    Without the lock, two systems that start at the same time would both find them free, and one would fail later.

    Args:
        resources: the name of each, for example "port 50051", and how to choose another one.

    Raises:
        ValueError: another `echoray serve` of this user uses it; the text names that process.
    """
    from echovlm_ray.serving.cluster.held_file import HeldError

    with ExitStack() as held:
        held.callback(_remove_folder_if_empty)
        for resource, remedy in resources.items():
            try:
                held.enter_context(_held(f"{hashlib.sha256(resource.encode()).hexdigest()[:16]}.claim"))
            except HeldError as error:
                if not error.holder:
                    raise ValueError(
                        f"another `echoray serve` here with {resource} was killed, and what it started still ends: try "
                        f"again in a few seconds; or {remedy}"
                    ) from None
                raise ValueError(
                    f"another `echoray serve` (process {error.holder}) is starting or running here with {resource}: "
                    f"`echoray stop --pid {error.holder}` ends it; or {remedy}"
                ) from None
        yield


@contextmanager
def _held(name: str) -> Iterator[None]:
    from echovlm_ray.serving.cluster.held_file import hold, release

    while True:
        path = _folder() / name
        # Another one may have removed the folder at its end.
        with suppress(FileNotFoundError):
            descriptor = hold(path, 0o600)
            break
    try:
        yield
    finally:
        release(descriptor, path)


def ready_at(pid: int, control: str, gateway: str) -> None:
    """Records the addresses of an announced system, of which the system may choose the ports."""
    path = _folder() / f"{pid}.json"
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text())
        path.write_text(json.dumps({**known, "control": control, "gateway": gateway}))


def running_systems() -> list[LocalSystem]:
    """The running systems. Removes files of killed ones."""
    from echovlm_ray.serving.cluster.held_file import remove_if_free

    folder = _folder()
    for path in folder.glob("*.claim"):
        remove_if_free(path)
    systems = []
    for path in sorted(folder.glob("*.json")):
        try:
            system = LocalSystem(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue
        if system.process is None:
            path.unlink(missing_ok=True)
        else:
            systems.append(system)
    if not systems:
        _remove_folder_if_empty()
    return systems


def system_named(name: str) -> LocalSystem:
    """The running system with a name.

    Raises:
        ValueError: there are none or several.
    """
    found = [system for system in running_systems() if system.name == name]
    if len(found) == 1:
        return found[0]
    others = ", ".join(sorted({system.name for system in running_systems() if system.name})) or "none has a name"
    what = "several systems of yours on this machine have" if found else "no system of yours on this machine has"
    raise ValueError(f"{what} the name {name!r} ({others}): name its address instead")


def _remove_folder_if_empty() -> None:
    with suppress(OSError, ValueError):
        _folder().rmdir()


def _folder() -> Path:
    from experts.private_folder import runtime_folder

    return runtime_folder()
