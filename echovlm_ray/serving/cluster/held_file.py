"""A lock file that one process at a time locks, and removes on release.

The lock is a flock, so it is released when its process ends in any way. The file of a killed process stays until the
next one takes it or `remove_if_free` removes it.
"""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

import psutil

# `remove_if_free` has a lock for so long at most.
LOOK_S = 0.05
_POLL_S = 0.005


class HeldError(Exception):
    """Another process has the lock.

    Attributes:
        holder: its process id; "" if the file has none, or that of an ended process, whose children still end.
    """

    def __init__(self, holder: str) -> None:
        super().__init__(f"held by process {holder}" if holder else "held")
        self.holder = holder


def hold(path: Path, mode: int) -> int:
    """Makes the file where there is none, locks it and writes this process's id into it.

    Args:
        path: the file; its folder exists.
        mode: of a file that is made.

    Returns:
        The descriptor to give to `release`.

    Raises:
        HeldError: another process has the lock.
        OSError: it cannot be made or locked.
    """
    deadline = time.monotonic() + LOOK_S
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous owner may have removed the file between the two calls; a lock on the removed file excludes no
            # process.
            if _has_name(descriptor, path):
                # On a full disk the file has no process id, but is locked all the same.
                with suppress(OSError):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                return descriptor
        except BlockingIOError:
            content = os.pread(descriptor, 32, 0)
            holder = content.decode() if content.isdigit() and _runs(int(content)) else ""
            if not holder and time.monotonic() < deadline:
                time.sleep(_POLL_S)
                os.close(descriptor)
                continue
            os.close(descriptor)
            raise HeldError(holder) from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def release(descriptor: int, path: Path) -> None:
    """Removes the file and frees the lock."""
    # While it is locked, so that it is this process's own.
    with suppress(OSError):
        if _has_name(descriptor, path):
            path.unlink()
    os.close(descriptor)


def remove_if_free(path: Path) -> None:
    """Removes the file of a killed process; a locked file is not removed."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _has_name(descriptor, path):
                path.unlink()
        finally:
            os.close(descriptor)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _has_name(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
