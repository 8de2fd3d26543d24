"""The memory of every process below one, named by what it is."""

from dataclasses import dataclass

import psutil

# Part of a command → what the process is. The first that fits counts.
_KINDS = {
    "ray::ServeController": "Ray Serve's controller",
    "ray::DashboardAgent": "Ray's metrics agent",
    "ray::RuntimeEnvAgent": "Ray's environment agent",
    "dashboard/dashboard.py": "Ray's API server",
    "autoscaler/_private/monitor.py": "Ray's autoscaler",
    "log_monitor.py": "Ray's log monitor",
    "gcs_server": "Ray's store (gcs_server)",
    "raylet/raylet": "raylet",
    "ray::": "another worker of Ray",
    "echovlm_ray.vision.decoding": "image decoders",
    "experts.checks.check_fork_server": "bundle checks",
}
_REPLICA = "ray::ServeReplica:"


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """One process.

    Attributes:
        kind: what it is; for a replica its application.
        pid: its number.
        resident: bytes, with all that it shares.
        proportional: bytes, each shared page divided by how many processes have it.
    """

    kind: str
    pid: int
    resident: int
    proportional: int


def memory_below(pid: int, command_kind: str) -> list[ProcessMemory]:
    """Every process below one and that one itself, the largest first.

    Args:
        pid: of the topmost process.
        command_kind: what that process, and any other that is not known, is called.
    """
    top = psutil.Process(pid)
    found = []
    for process in [top, *top.children(recursive=True)]:
        try:
            command = " ".join(process.cmdline())
            memory = process.memory_full_info()
        except psutil.NoSuchProcess:
            continue
        if command:
            found.append(ProcessMemory(_kind(command) or command_kind, process.pid, memory.rss, memory.pss))
    return sorted(found, key=lambda process: -process.proportional)


def _kind(command: str) -> str:
    if command.startswith(_REPLICA):
        return command.removeprefix(_REPLICA).split(":")[0]
    return next((kind for part, kind in _KINDS.items() if part in command), "")
