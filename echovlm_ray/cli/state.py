"""Which systems this user runs on this machine, so that another shell can find and stop them.

One small file per running `echoray serve`, in a folder that only its user can read.
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
        created: when its process started; tells it from a later process with the same id.
        name: of the system; "" is the default one.
        address: of the Ray cluster that it joined; "" where it has a Ray of its own.
        gateway: where clients reach it. Both addresses are the configured ones until the system is ready.
        database: the file of its rollouts' database; "" where it has none, or none that is a file.
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
        """Its process, or None when it has ended."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


@contextmanager
def announced(
    checkpoint: str, control: str, gateway: str, *, name: str = "", address: str = "", database: str = ""
) -> Iterator[None]:
    """Lets this process be found by `running_systems` while the block lasts."""
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
    """Keeps for this process, while the block lasts, what two systems of this machine cannot share.

    Two that start at once would both find it free, and one of them would fail later, in another process.

    Args:
        resources: what each is called, for example "port 50051", and how the user gives another one.

    Raises:
        ValueError: another `echoray serve` of this user has it; the text names that process.
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
        # Another one that ended just now may have removed the folder.
        with suppress(FileNotFoundError):
            descriptor = hold(path, 0o600)
            break
    try:
        yield
    finally:
        release(descriptor, path)


def ready_at(pid: int, control: str, gateway: str) -> None:
    """Records where an announced system listens, which the configuration may leave to the system."""
    path = _folder() / f"{pid}.json"
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text())
        path.write_text(json.dumps({**known, "control": control, "gateway": gateway}))


def running_systems() -> list[LocalSystem]:
    """The systems that run now; files that a killed one left behind are removed."""
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
    """The running system of a name.

    Raises:
        ValueError: none, or several, have it.
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
