"""Drops the privileges of a decoder process before it reads a caller's first byte.

The limits also apply to code that an attacker has taken over, unless it runs as root, which may raise them again.
"""

import ctypes
import resource
from contextlib import suppress
from pathlib import Path

# Libraries that are imported on demand are opened one after the other.
MAX_OPEN_FILES = 64
_PR_SET_NO_NEW_PRIVS = 38


def confine(max_memory_bytes: int) -> None:
    """Limits this process for good: its memory, and that it writes no file, starts nothing and gains no rights.

    Args:
        max_memory_bytes: the gateway ends the process when so much more of its memory is in use. Should it be too late
            for that, allocations fail at twice as much address space, which many decoders take for a damaged file.
    """
    # Where memory runs out all the same, the kernel ends this process rather than one that serves.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: address_space + 2 * max_memory_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        # Threads count as well.
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
