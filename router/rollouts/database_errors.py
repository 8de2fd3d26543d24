"""Translates a database's errors into ones that name the cause and the fix."""

import os
import shutil
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from router.errors import RolloutDatabaseError, RolloutDatabaseFullError, RolloutDatabaseUnavailableError

LOCKS = Path("/proc/locks")
# SQLite needs a page or two. A file system with less free space than this counts as full.
FULL_BYTES = 256 * 1024
# Files that SQLite creates next to a database.
_COMPANIONS = ("", "-wal", "-shm")
# SQLSTATE classes of PostgreSQL, https://www.postgresql.org/docs/current/errcodes-appendix.html.
_PG_DISK_FULL = "53100"
_PG_READ_ONLY = "25006"


def explained(error: Exception, name: str, path: Path | None, waited_s: float) -> RolloutDatabaseError | None:
    """The error for operators; None if the database is not the cause.

    Args:
        error: the driver's error, with or without SQLAlchemy's wrapper.
        name: the database's URL, without its password.
        path: its file, if it is one.
        waited_s: how long the call waited for a lock.
    """
    cause = error.orig if isinstance(error, DBAPIError) else error
    database = f"the rollouts' database {path or name}"
    if isinstance(cause, sqlite3.Error):
        return _of_sqlite(cause, database, path, waited_s)
    if isinstance(error, DBAPIError) and type(cause).__name__ in ("OperationalError", "InterfaceError", "DiskFull"):
        return _of_postgresql(cause, database)
    return None


def first_line(error: object) -> str:
    """The driver's message in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def lock_holders(path: Path) -> list[int]:
    """The other processes with a write lock on a SQLite file, as far as /proc/locks lists them."""
    files = set()
    for suffix in _COMPANIONS:
        try:
            status = os.stat(f"{path}{suffix}")
        except OSError:
            continue
        files.add((os.major(status.st_dev), os.minor(status.st_dev), status.st_ino))
    try:
        lines = LOCKS.read_text().splitlines()
    except OSError:
        return []
    return sorted({pid for pid, file in _write_locks(lines) if file in files and pid not in (0, os.getpid())})


def _of_sqlite(cause: sqlite3.Error, database: str, path: Path | None, waited_s: float) -> RolloutDatabaseError | None:
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
    folder = path.parent if path is not None else None
    full = folder is not None and _is_full(folder)
    if code == sqlite3.SQLITE_FULL or (full and code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)):
        return RolloutDatabaseFullError(
            f"the disk is full: {database} cannot be written, and nothing was changed. Make room in {folder}, then ask "
            "again"
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        holders = lock_holders(path) if path is not None else []
        who = f"process {', '.join(map(str, holders))}" if holders else "another process"
        return RolloutDatabaseUnavailableError(
            f"{database} is locked by {who}, for more than {waited_s:g} s, and nothing was changed. End what holds it "
            f"(`fuser {path}` names it), then ask again"
        )
    if code == sqlite3.SQLITE_READONLY:
        return RolloutDatabaseError(
            f"{database} cannot be written, and nothing was changed: {first_line(cause)}. Let the user who runs the "
            f"system write the file and its folder {folder}, on a file system that is not mounted read-only"
        )
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
        return RolloutDatabaseUnavailableError(
            f"{database} cannot be reached: {first_line(cause)}. Check that {folder} is there, that its user may write "
            "to it, and its disk"
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return RolloutDatabaseError(
            f"{database} is damaged: {first_line(cause)}. Stop the system, put a backup in its place (`echoray experts "
            "restore`), and start it again"
        )
    return None


def _of_postgresql(cause: object, database: str) -> RolloutDatabaseError:
    state = getattr(cause, "sqlstate", None)
    if state == _PG_DISK_FULL:
        return RolloutDatabaseFullError(
            f"the disk of {database} is full, and nothing was changed: make room there, then ask again"
        )
    if state == _PG_READ_ONLY:
        return RolloutDatabaseError(f"{database} takes no writes: it is read-only, perhaps a standby; give the primary")
    return RolloutDatabaseUnavailableError(
        f"{database} cannot be reached: {first_line(cause)}. Check that its server runs and can be reached from Control"
    )


def _is_full(folder: Path) -> bool:
    """Whether the file system is full. File systems without a size, like /proc, never are."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return False
    return usage.total > 0 and usage.free < FULL_BYTES


def _write_locks(lines: Iterable[str]) -> Iterable[tuple[int, tuple[int, int, int]]]:
    """Process and file of every write lock in /proc/locks: device numbers in hexadecimal, then the inode."""
    for line in lines:
        fields = line.replace("->", "").split()
        if len(fields) < 6 or fields[3] != "WRITE":
            continue
        major, minor, inode = fields[5].split(":")
        yield int(fields[4]), (int(major, 16), int(minor, 16), int(inode))
