"""Backups of the rollouts' database: created while a system uses it, verified, and restored while none does.

The database uses SQLite's write-ahead log, so its main file may miss the last writes; a backup is one complete file.
PostgreSQL has its own tools.
"""

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError

from echovlm_ray.serving.cluster.rollout_files import SQLITE, DatabaseLock, RolloutFiles
from router.errors import RolloutDatabaseError, RolloutStateError
from router.gating.expert_set import ExpertSet
from router.rollouts import history
from router.rollouts.database import Database
from router.rollouts.database_file import DatabaseFile
from router.rollouts.store import RolloutStore

PARTIAL_SUFFIX = ".partial"
_PAGES_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Backup:
    """A verified database.

    Attributes:
        path: the file.
        entries: the number of history entries.
        head: the hash of the last one.
        size_bytes: the size of the file.
    """

    path: Path
    entries: int
    head: str
    size_bytes: int


def back_up(files: RolloutFiles, target: Path) -> Backup:
    """Writes a copy of the database, which may be in use. The file appears when it is complete and verified.

    Args:
        files: the files of the system.
        target: the file to create; its folder must exist.

    Raises:
        RolloutDatabaseError: there is no database, it is PostgreSQL, or its history is invalid.
        FileExistsError: the file exists.
        OSError: writing the copy failed.
    """
    source = _database_file(files, 'pg_dump --format=custom --file=FILE "URL"')
    if not source.is_file():
        raise RolloutDatabaseError(
            f"there is no rollouts' database {source}: name the system's --config or --checkpoint; a system that was "
            "never started has none"
        )
    if target.exists():
        raise FileExistsError(17, "exists, and a backup is never overwritten: give another name", str(target))
    _check_contents(source)
    with _partial(target) as partial:
        _copy(source, partial)
        found = check(partial, f"the rollouts' database {source}")
        os.replace(partial, target)
        _sync_folder(target.parent)
    return Backup(target, found.entries, found.head, found.size_bytes)


def restore(file: Path, files: RolloutFiles, expert_set: ExpertSet) -> tuple[Backup, Path | None]:
    """Replaces the database by a backup, and keeps the previous one in the same folder.

    Atomic: if it is killed, either the previous or the restored database is complete.

    Args:
        file: the backup, which is not changed.
        files: the files of the system.
        expert_set: the expert set of the system's checkpoint.

    Returns:
        The restored database, and the path of the previous one; None if there was none.

    Raises:
        RolloutDatabaseError: the file is not a valid backup, a system uses the database, or it is PostgreSQL.
        RolloutStateError: the backup belongs to another backbone, routing or deployment.
        OSError: reading or writing failed.
    """
    target = _database_file(files, 'pg_restore --clean --if-exists --dbname="URL" FILE')
    if not file.is_file():
        raise FileNotFoundError(2, "is no file", str(file))
    lock = DatabaseLock(files.lock)
    lock.take(0)
    try:
        with _partial(target) as partial:
            # The copy is verified and used, so that concurrent changes of the backup have no effect.
            _copy(file, partial)
            found = check(partial, str(file))
            _check_identity(partial, file, target)
            _check_belongs(partial, file, expert_set)
            kept = _keep_aside(target)
            # Replicas that start without Control would take it for the newest policy.
            files.policy.unlink(missing_ok=True)
            # The write-ahead log of the previous database must not be applied to the new one.
            for suffix in ("-wal", "-shm"):
                target.with_name(target.name + suffix).unlink(missing_ok=True)
            os.replace(partial, target)
            _sync_folder(target.parent)
    finally:
        lock.release()
    return Backup(target, found.entries, found.head, found.size_bytes), kept


def check(path: Path, name: str) -> Backup:
    """Verifies that a file is a complete rollouts' database with a valid history.

    Args:
        path: the file; nothing else may use it.
        name: its name in errors.

    Raises:
        RolloutDatabaseError: it is not; the text has the problem.
    """
    engine = create_engine(f"{SQLITE}{path}")
    try:
        with engine.connect() as connection:
            sound = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar_one()
            if sound != "ok":
                raise RolloutDatabaseError(f"{name} is damaged: {sound}")
            tables = {row[0] for row in connection.exec_driver_sql("SELECT name FROM sqlite_master")}
            if not {"history", "history_head", "alembic_version"} <= tables:
                raise RolloutDatabaseError(
                    f"{name} is no rollouts' database: it has no history. A copy of rollouts.db alone may lack all "
                    "that lies in rollouts.db-wal: make backups with `echoray experts backup`"
                )
            verified = history.verify(connection)
    except DBAPIError as error:
        raise RolloutDatabaseError(f"{name} is no rollouts' database, or is damaged: {error.orig}") from None
    finally:
        engine.dispose()
    if verified.problem:
        raise RolloutDatabaseError(f"the history of {name} does not hold together: {verified.problem}")
    return Backup(path, verified.head.count, verified.head.hash, path.stat().st_size)


def _database_file(files: RolloutFiles, other_way: str) -> Path:
    if not files.database.startswith(SQLITE):
        raise RolloutDatabaseError(f"the rollouts' database is PostgreSQL, which has its own tools: use `{other_way}`")
    return files.base


def _check_identity(path: Path, file: Path, target: Path) -> None:
    """Refuses to replace a deployment's database by the backup of another one."""
    backed_up, there = _identity_of(path), _identity_of(target) if target.is_file() else None
    if backed_up and there and backed_up != there:
        raise RolloutStateError(
            f"{file} is of the deployment {backed_up[:12]}…, and {target} is of {there[:12]}…: name the system that "
            f"the backup was made of, or move {target} away to replace it on purpose"
        )


def _identity_of(path: Path) -> str | None:
    """The identity of a database's deployment; None if there is none or it is unreadable."""
    try:
        with closing(sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True)) as connection:
            row = connection.execute("SELECT identity FROM deployment").fetchone()
    except sqlite3.Error:
        return None
    return None if row is None else str(row[0])


def _check_belongs(path: Path, file: Path, expert_set: ExpertSet) -> None:
    """Opens a copy like the system does, with migrations of older schemas."""
    database = Database(f"{SQLITE}{path}")
    try:
        snapshot = RolloutStore(database).snapshot()
    finally:
        database.close()
    ours, theirs = (expert_set.backbone_digest, expert_set.routing), (snapshot.backbone_digest, snapshot.routing)
    if ours != theirs:
        raise RolloutStateError(
            f"{file} belongs to the backbone {theirs[0][:12]}… with {theirs[1]!r} routing, but the checkpoint is "
            f"{ours[0][:12]}… with {ours[1]!r}: name the checkpoint that it was made of"
        )
    _make_single(path)


def _copy(source: Path, target: Path) -> None:
    try:
        with (
            closing(sqlite3.connect(f"file:{_quoted(source)}?mode=rw", uri=True)) as reading,
            closing(sqlite3.connect(target)) as writing,
        ):
            reading.backup(writing, pages=_PAGES_AT_ONCE)
        _make_single(target)
    except sqlite3.Error as error:
        raise RolloutDatabaseError(f"{source} cannot be copied to {target.parent}: {error}") from None


def _check_contents(database: Path) -> None:
    """Checks the contents before SQLite applies a write-ahead log that may belong to another file.

    Raises:
        RolloutDatabaseError: it does, or this is not a rollouts' database.
    """
    try:
        DatabaseFile.opened(database).check_contents()
    except sqlite3.Error as error:
        raise RolloutDatabaseError(f"the rollouts' database {database} cannot be read: {error}") from None


def _make_single(path: Path) -> None:
    """Checkpoints the write-ahead log into the file and syncs it to disk."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _keep_aside(database: Path) -> Path | None:
    """Hard-links the database to a second name, after checkpointing its log if it is intact."""
    if not database.exists():
        return None
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    kept = database.with_name(f"{database.name}.before-restore-{stamp}")
    with suppress(sqlite3.Error, RolloutDatabaseError):
        _check_contents(database)
        with closing(sqlite3.connect(database, isolation_level=None)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    _link_or_copy(database, kept)
    log = database.with_name(f"{database.name}-wal")
    if log.exists() and log.stat().st_size:
        # The database is damaged, so that its log could not be applied.
        _link_or_copy(log, kept.with_name(f"{kept.name}-wal"))
    return kept


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A temporary file in the target's folder, which is removed at the end of the block unless it was renamed."""
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=PARTIAL_SUFFIX)
    os.close(descriptor)
    path = Path(name)
    try:
        yield path
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _quoted(path: Path) -> str:
    return quote(str(path.absolute()))
