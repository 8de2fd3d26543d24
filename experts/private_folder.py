"""A private folder of this user on this machine: for sockets, locks, secrets and the list of running systems.

Its parent is writable for every user, so another user may have taken the name. Then the next name is used, so that no
user can prevent another from starting.
"""

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

# A Unix socket's path has at most 107 bytes and a terminating zero.
MAX_SOCKET_PATH = 107
_NAMES = 1000
_FALLBACKS = ("/tmp", "/var/tmp", "/dev/shm")


def private_folder(base: str | None = None, *, longest: int = 4096) -> Path:
    """Returns the folder, which is created if it is missing. All processes of this user on this machine get the same
    one.

    Args:
        base: the parent folder; by default the system's temporary folder.
        longest: the most bytes of its path; if `base` is too long, /tmp is used.

    Raises:
        ValueError: it cannot be created; the text names the fix.
    """
    bases = [tempfile.gettempdir() if base is None else base, *_FALLBACKS]
    fitting = [found for found in bases if len(os.fsencode(found)) + len(f"/echoray-{os.getuid()}-{_NAMES}") <= longest]
    for found in fitting:
        if (folder := _ours(Path(found)) or _made(Path(found))) is not None:
            return folder
    raise ValueError(
        f"no folder of yours can be made in {' or '.join(dict.fromkeys(fitting or bases))}: set TMPDIR to a folder "
        "that you may write"
    )


def runtime_folder() -> Path:
    """The folder for runtime files: `XDG_RUNTIME_DIR` if it belongs to this user."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    # After `su` it still refers to the previous user's folder.
    return private_folder(base if base and os.access(base, os.W_OK | os.X_OK) else None)


def user_folder(variable: str, under_home: str) -> Path:
    """A folder of this user, by the XDG base directory specification.

    Args:
        variable: the environment variable with the folder, for example XDG_CACHE_HOME.
        under_home: the default below the home folder, for example .cache. A user without a writable home, as in
            containers, gets `private_folder` instead.
    """
    if base := os.environ.get(variable):
        return Path(base)
    try:
        home = Path.home()
    except RuntimeError:
        return private_folder() / under_home
    there = home / under_home
    nearest = next(path for path in (there, *there.parents) if path.exists())
    return there if os.access(nearest, os.W_OK | os.X_OK) else private_folder() / under_home


def is_private(path: Path) -> bool:
    """Whether a path is a folder (not a link) of this user that no other user may enter."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _names(base: Path) -> Iterator[Path]:
    name = f"echoray-{os.getuid()}"
    yield base / name
    for number in range(1, _NAMES):
        yield base / f"{name}-{number}"


def _ours(base: Path) -> Path | None:
    """The first folder that belongs to this user already."""
    for path in _names(base):
        try:
            found = path.lstat()
        except OSError:
            # Names after a free one are checked too: the free one may have been taken when the folder was created.
            if not any(base.glob(f"echoray-{os.getuid()}-*")):
                return None
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            path.chmod(0o700)
            return path
    return None


def _made(base: Path) -> Path | None:
    for path in _names(base):
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            # Another process of this user may have created it concurrently.
            if is_private(path):
                return path
            continue
        except OSError:
            return None
        return path
    return None
