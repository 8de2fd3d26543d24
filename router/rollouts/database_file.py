"""The file of a SQLite database: created atomically, and identified by its device and inode."""

import contextlib
import os
import secrets
import sqlite3
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote

from router.errors import RolloutDatabaseError, RolloutDatabaseLostError


@dataclass(slots=True)
class DatabaseFile:
    """The file that was opened, even if its name refers to another file now, and its write-ahead log."""

    path: Path
    device: int
    inode: int
    log_inode: int | None = None

    @classmethod
    def opened(cls, path: Path) -> Self:
        """The file that this name refers to now.

        Raises:
            RolloutDatabaseError: there is none, or it is empty.
        """
        try:
            found = path.stat()
            if found.st_mode & 0o077 and found.st_uid == os.geteuid():
                # An older release created it with a wider mode, or it is a copy.
                path.chmod(0o600)
        except FileNotFoundError:
            if path.is_symlink():
                raise RolloutDatabaseError(
                    f"the rollouts' database {path} is a link to {path.readlink()}, which does not exist: bring that "
                    "back, or remove the link and start with `echoray serve --begin-anew` to begin from the "
                    "checkpoint's own experts"
                ) from None
            raise RolloutDatabaseError(
                f"the rollouts' database {path} does not exist: restore a backup of it (`echoray experts restore`), or "
                "start with `echoray serve --begin-anew` to begin from the checkpoint's own experts"
            ) from None
        except OSError as error:
            raise RolloutDatabaseError(f"the rollouts' database {path} cannot be opened: {error.strerror}") from None
        if stat.S_ISDIR(found.st_mode):
            raise RolloutDatabaseError(f"{path} is a folder: set rollouts.database to a file in it")
        if not found.st_size:
            raise RolloutDatabaseError(
                f"the rollouts' database {path} is an empty file: what it said is lost. Restore a backup of it "
                "(`echoray experts restore`), or remove it and start with `echoray serve --begin-anew` to begin from "
                "the checkpoint's own experts"
            )
        return cls(path, found.st_dev, found.st_ino)

    def check(self) -> None:
        """Checks that the name still refers to the file that was opened.

        Raises:
            RolloutDatabaseLostError: it was deleted or replaced.
        """
        try:
            found = self.path.stat()
        except OSError:
            raise RolloutDatabaseLostError(
                f"the rollouts' database {self.path} was deleted while it was in use, so nothing can be changed: what "
                "is served stays as it is; copy a backup of it there, or stop the system and put one back with "
                "`echoray experts restore`"
            ) from None
        if (found.st_dev, found.st_ino) != (self.device, self.inode):
            raise RolloutDatabaseLostError(
                f"another file was put in the place of the rollouts' database {self.path} while it was in use, so "
                "nothing can be changed until this deployment's own database is there, which Control then opens: what "
                "is served stays as it is"
            )

    def check_contents(self) -> None:
        """Checks that the file is a rollouts' database, and that a write-ahead log next to it belongs to it.

        SQLite applies any log of that name. If a backup was copied here next to the log of the previous database,
        applying it would damage the backup. So nothing is written.

        Raises:
            RolloutDatabaseError: it is another program's database, or damaged together with its log.
            sqlite3.Error: it cannot be read.
        """
        log = self._beside("-wal")
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(self.path))}?mode=ro", uri=True)) as looking:
            tables = {row[0] for row in looking.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables and "history_head" not in tables:
                raise RolloutDatabaseError(
                    f"{self.path} is another program's database, with the table {min(tables)[:60]!r}: set "
                    "rollouts.database to another file"
                )
            if not log.exists() or not log.stat().st_size:
                return
            try:
                sound = looking.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",)
            except sqlite3.DatabaseError:
                sound = False
        if not sound:
            raise RolloutDatabaseError(
                f"the rollouts' database {self.path} is broken together with {log.name}, which was written beside "
                f"another one: if you put a backup there, remove {log.name} and {self._beside('-shm').name}; otherwise "
                "put one there with `echoray experts restore`"
            )

    def check_log(self) -> None:
        """Checks, inside a transaction, that the write-ahead log exists. Without it the commit would be lost.

        Raises:
            RolloutDatabaseLostError: it was deleted.
        """
        try:
            self.log_inode = self._beside("-wal").stat().st_ino
        except OSError:
            raise RolloutDatabaseLostError(
                f"the write-ahead log of the rollouts' database {self.path} was deleted while it was in use, so "
                "nothing can be changed until Control has opened the database again"
            ) from None

    def set_log_aside(self) -> None:
        """Renames the write-ahead log if the database was replaced by another file.

        SQLite would apply it to that file and overwrite its contents with those of the lost database.
        """
        log = self._beside("-wal")
        try:
            self.check()
        except RolloutDatabaseLostError:
            with contextlib.suppress(FileNotFoundError):
                if log.stat().st_ino == self.log_inode:
                    log.rename(self._beside(f"-wal.aside-{secrets.token_hex(4)}"))
                    self._beside("-shm").unlink(missing_ok=True)

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(f"{self.path.name}{suffix}")

    def holds(self, identity: str) -> bool:
        """Whether this name refers to an intact database of this identity. Writes and locks nothing.

        A file that is still being copied is not intact yet.
        """
        try:
            with contextlib.closing(
                sqlite3.connect(f"file:{quote(str(self.path))}?mode=ro&immutable=1", uri=True)
            ) as probe:
                found = probe.execute("SELECT identity FROM deployment").fetchone()
                return bool(found == (identity,) and probe.execute("PRAGMA quick_check").fetchone() == ("ok",))
        except sqlite3.Error:
            return False


def make_database_file(path: Path, make_tables: Callable[[Path], None]) -> None:
    """Creates the file if there is none. It appears with all of its tables, so an empty file always means a loss.

    Args:
        path: the file.
        make_tables: creates the tables in a temporary file.

    Raises:
        RolloutDatabaseError: the folder cannot be created or written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RolloutDatabaseError(f"the folder of the rollouts' database {path} cannot be made: {error}") from error
    if path.exists():
        return
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        # The write-ahead log gets the same mode from SQLite.
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        make_tables(partial)
        # Of two processes that do this at once, the second uses the first one's file.
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    except OSError as error:
        raise RolloutDatabaseError(
            f"the rollouts' database {path} cannot be made: {error.strerror}; set rollouts.database to a file on a "
            "local disk in a folder that may be written"
        ) from None
    finally:
        for suffix in ("", "-wal", "-shm"):
            partial.with_name(partial.name + suffix).unlink(missing_ok=True)
