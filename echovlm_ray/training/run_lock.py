"""A lock so that one process at a time trains a run; the kernel releases it when the process ends."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from echovlm_ray.config import Section
from echovlm_ray.training.errors import TrainingError

LOCK_NAME = "run.lock"
# What this process holds: `train_expert` holds a run and calls `train_stages`, which holds it too.
_held: set[Path] = set()


class Holder(Section):
    """The process that trains a run, from its lock file; valid only while the file is locked."""

    pid: int
    host: str


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Locks an existing folder against other training processes within the block.

    The lock is one of POSIX records (`fcntl.lockf`): those are not passed on to forked processes, so that readers of
    examples that outlive a killed run do not hold it. The file stays; only its lock counts.

    Raises:
        TrainingError: another process holds the lock, which the text names, or the file system has no locks.
    """
    path = folder.resolve() / LOCK_NAME
    if path in _held:
        yield
        return
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise TrainingError(
                f"{folder} is being trained by {_holder(file.read())}: wait until that has ended, or stop it with "
                "Ctrl-C (`kill -INT`, which saves) and go on with --resume"
            ) from None
        except OSError as error:
            raise TrainingError(
                f"{path} cannot be locked: {error.strerror or error}; put the run on a file system with locks"
            ) from None
        file.truncate(0)
        file.write(Holder(pid=os.getpid(), host=socket.gethostname()).model_dump_json().encode())
        file.flush()
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
            file.truncate(0)


def _holder(written: bytes) -> str:
    try:
        holder = Holder.model_validate_json(written)
    except ValidationError:
        # It has the lock and has not written yet.
        return "another process"
    return f"process {holder.pid} on {holder.host}"
