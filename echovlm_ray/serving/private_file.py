"""Files that only this process's user may read: tokens and keys."""

import os
import stat
from pathlib import Path

_OTHERS_READ = stat.S_IRGRP | stat.S_IROTH


def read_private(path: Path, field: str) -> bytes:
    """The contents of a file that no other user can read.

    Args:
        path: the file.
        field: what the configuration calls it.

    Raises:
        ValueError: it cannot be read, or others can read it as well; the text says what to type.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & _OTHERS_READ:
                raise ValueError(f"{field} {path} can be read by other users of this machine: chmod 600 {path}")
            return file.read()
    except OSError as error:
        raise ValueError(f"{field} {path} cannot be read: {error.strerror}") from None
