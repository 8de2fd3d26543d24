"""Errors of a full disk name the folder in which to free space, which the operating system's error does not."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# No room on the disk, and none left of what this user may take.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Has an error of a full disk name the folder that is written while the block lasts.

    Raises:
        OSError: with the same number, the folder as its `filename`, and what to do as its `strerror`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise OSError(error.errno, f"{error.strerror}: make room there", str(folder)) from error
