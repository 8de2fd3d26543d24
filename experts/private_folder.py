"""A folder of this machine that belongs to this user alone: for sockets, locks, secrets and what runs here.

It lies where every user may write, so another one may have taken its name. Then the next name is used, so that no
user keeps another from starting.
"""

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

# A Unix socket's path has at most 107 bytes and the zero at its end.
MAX_SOCKET_PATH = 107
_NAMES = 1000
_FALLBACKS = ("/tmp", "/var/tmp", "/dev/shm")


def private_folder(base: str | None = None, *, longest: int = 4096) -> Path:
    """The folder, made if it is missing; all processes of this user on this machine find the same one.

    Args:
        base: the folder to make it in; by default where the system keeps what is temporary.
        longest: bytes that its path may have; with a longer base, another one is taken that every system has.

    Raises:
        ValueError: it cannot be made anywhere; the text says how to give a place.
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
    """The folder for what is there only while something runs: `XDG_RUNTIME_DIR` where that is this user's."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    # After `su` it is still that of the user before.
    return private_folder(base if base and os.access(base, os.W_OK | os.X_OK) else None)


def user_folder(variable: str, under_home: str) -> Path:
    """Where this user keeps things of a kind, as the XDG base directory specification has it.

    Args:
        variable: names the folder if it is set, for example XDG_CACHE_HOME.
        under_home: where it is otherwise, for example .cache. A user id without a home, or whose home it may not
            write, as in containers, has it in `private_folder` instead.
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
    """Whether a path is a folder, no link, of this user, that no other user may enter."""
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
    """The first that is ours already."""
    for path in _names(base):
        try:
            found = path.lstat()
        except OSError:
            # Those after a free name are looked at as well: what was taken when ours was made may be gone by now.
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
            # Another process of this user may just have made it.
            if is_private(path):
                return path
            continue
        except OSError:
            return None
        return path
    return None
