"""The folder of a local Ray's sockets and logs, which no other user may enter.

Ray gives its folders mode 0777, this one among them and again and again, so that anyone could rename a socket or have a
log written where he likes. The folder above is closed to all but this user.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from experts.private_folder import MAX_SOCKET_PATH, private_folder

logger = logging.getLogger(__name__)

_PREFIX = "ray-"
# What Ray adds: /session_2026-11-30_04-37-08_550449_4194304/sockets/plasma_store.1
_RAY_ADDS = 66
# Of systems that were killed or lost their Ray, so many are kept, to look for the reason.
_KEPT = 3


@contextmanager
def ray_folder() -> Iterator[Path]:
    """A new folder for one Ray. It is removed when the block ends in order, and stays, with its logs, otherwise.

    `RAY_TMPDIR` is where it is made, if that is set and its sockets' paths would not be too long.

    Raises:
        ValueError: no folder can be made.
    """
    folder = _new_folder()
    try:
        yield folder
    except Exception:
        logger.warning("Ray's logs of this run are kept in %s", logs_of(folder))
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)


def logs_of(folder: Path) -> Path:
    """Where the logs of the Ray in a folder are."""
    return folder / "session_latest" / "logs"


def logs_of_this_process() -> Path | None:
    """Where the logs of the Ray are that this process started; None where it started none."""
    folder = _base() / f"{_PREFIX}{os.getpid()}"
    return logs_of(folder) if folder.is_dir() else None


def _base() -> Path:
    room = len(f"/{_PREFIX}{2**22}") + _RAY_ADDS
    return private_folder(os.environ.get("RAY_TMPDIR"), longest=MAX_SOCKET_PATH - room)


def _new_folder() -> Path:
    base = _base()
    left = [path for path in base.glob(f"{_PREFIX}*") if not _is_used(path)]
    for path in sorted(left, key=lambda path: path.stat().st_mtime)[: max(0, len(left) - _KEPT)]:
        shutil.rmtree(path, ignore_errors=True)
    folder = base / f"{_PREFIX}{os.getpid()}"
    # Of an earlier process with this id.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


def _is_used(path: Path) -> bool:
    number = path.name.removeprefix(_PREFIX)
    return number.isdecimal() and psutil.pid_exists(int(number))
