"""Adds the folder in which to free space to errors of a full disk."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The disk is full, or the user's quota is used up.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Adds the folder that is written within the block to errors of a full disk.

    Raises:
        OSError: with the same number, the folder as `filename`, and the fix as `strerror`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise OSError(error.errno, f"{error.strerror}: make room there", str(folder)) from error
