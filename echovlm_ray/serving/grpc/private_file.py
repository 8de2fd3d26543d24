"""Files that only this process's user, or root, may read and write: tokens and keys."""

import os
import stat
from pathlib import Path

_OTHERS = stat.S_IRGRP | stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH
_CHUNK_BYTES = 65_536
# 100,000 tokens of 64 characters with names take about ten million. A caller without a token has the file read too.
MAX_BYTES = 16 * 1024 * 1024


def read_private(path: Path, field: str) -> bytes:
    """The contents of a file that no other user can read or write.

    Args:
        path: the file.
        field: what the configuration calls it.

    Raises:
        ValueError: it cannot be read, it is larger than `MAX_BYTES`, it is another user's, or others can read or write
            it as well; the text says what to type.
    """
    try:
        # Token files are read with every call, and `open` takes three times as long. A pipe must not block.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise ValueError(f"{field} {path} is no regular file: give the path of one")
            if found.st_uid not in (os.geteuid(), 0):
                raise ValueError(f"{field} {path} belongs to another user: chown {os.geteuid()} {path}")
            if found.st_mode & _OTHERS:
                raise ValueError(f"{field} {path} can be read or written by other users: chmod 600 {path}")
            if found.st_size > MAX_BYTES:
                raise ValueError(f"{field} {path} has {found.st_size} bytes; at most {MAX_BYTES} are read")
            # In one piece, unless it is written meanwhile.
            pieces = [os.read(descriptor, found.st_size + 1)]
            while pieces[-1]:
                pieces.append(os.read(descriptor, _CHUNK_BYTES))
            return b"".join(pieces)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ValueError(f"{field} {path} cannot be read: {error.strerror}") from None
