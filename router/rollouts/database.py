"""Opens the rollouts' database: SQLite in a file, or PostgreSQL by URL; brings its tables up to date.

One writer at a time: SQLite by `BEGIN IMMEDIATE`, PostgreSQL by a lock on the history's head row.

SQLite writes to a deleted file without an error, and those writes are lost when the process ends. So every write checks
that the file is still the one that was opened, before its first statement and before its commit.
"""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, select, text, update
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from router.errors import RolloutDatabaseError, RolloutDatabaseLostError
from router.rollouts import schema
from router.rollouts.database_errors import explained, first_line
from router.rollouts.database_file import DatabaseFile, make_database_file
from router.rollouts.history import Head, hash_at, head_of

# Below the timeout of operators' commands, so that they get the reason.
BUSY_TIMEOUT_S = 10.0
MIGRATIONS = Path(__file__).parent / "migrations"
# The key of a PostgreSQL advisory lock; any number that other programs in the same database do not use.
ADVISORY_LOCK = 0x6563686F766C6D
_IMMEDIATE = "rollouts_immediate"
# Alembic has global state.
_ALEMBIC = threading.Lock()


class Database:
    """A database with current tables. Every method may be called from any thread."""

    def __init__(self, url: str, *, create: bool = True) -> None:
        """Connects, and migrates an older database. Processes that start at the same time wait for each other.

        Args:
            url: "sqlite:////var/lib/echovlm/rollouts.db" (the folder is made), or "postgresql://user@host/name".
            create: whether to create a database that does not exist yet. A file without tables is always refused: it is
                the remains of a database, not a new one.

        Raises:
            RolloutDatabaseError: it is unreachable, newer than this code, of an unsupported kind, empty, or missing
                without `create`.
        """
        parsed = _parse(url)
        self.name = parsed.render_as_string(hide_password=True)
        self._path = Path(str(parsed.database)) if parsed.get_backend_name() == "sqlite" else None
        self._file: DatabaseFile | None = None
        self._seen: Head | None = None
        try:
            with self._explaining():
                if self._path is not None:
                    if create:
                        make_database_file(self._path, lambda partial: _make_tables(parsed.set(database=str(partial))))
                    self._file = DatabaseFile.opened(self._path)
                    self._file.check_contents()
                    self.engine = _sqlite(parsed, self._file)
                else:
                    self.engine = _postgresql(parsed)
                _migrate(self, create=create and self._file is None)
                with self.read() as connection:
                    self.identity = str(connection.execute(text("SELECT identity FROM deployment")).scalar_one())
                    self._seen = head_of(connection)
        except (DBAPIError, sqlite3.Error) as error:
            raise RolloutDatabaseError(
                f"the rollouts' database {self.name} cannot be opened: {first_line(error)}; check that it is there, "
                "that its folder may be written, and that the credentials are right"
            ) from error

    @property
    def is_sqlite(self) -> bool:
        """Whether the database is a SQLite file."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction on one snapshot of the database.

        Raises:
            RolloutDatabaseLostError: the file was deleted or replaced since it was opened.
            RolloutDatabaseError: it is locked, unreachable or damaged; the text names the fix.
        """
        if self._file is not None:
            self._file.check()
        options: dict[str, Any] = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        with self._explaining(), self.engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that excludes all other writers, of any process. It is committed at the end.

        Raises:
            RolloutDatabaseLostError: the database was deleted or replaced since it was opened; nothing is written.
            RolloutDatabaseError: it is locked, full, unreachable or damaged; nothing was changed, and the text names
                the fix.
        """
        with self._explaining(), self._exclusive() as connection:
            # Under READ COMMITTED, the statements after the lock see the last writer's commit.
            connection.execute(text("SELECT id FROM history_head WHERE id = 1" + self._for_update))
            self._check(connection)
            yield connection
            head = head_of(connection)
            if self._file is not None:
                self._file.check()
                self._file.check_log()
        self._seen = head

    def check(self) -> None:
        """Checks that the database is still the one that was opened, with all writes.

        Raises:
            RolloutDatabaseLostError: it was deleted or replaced.
        """
        with self.read() as connection:
            self._check(connection)

    def take_identity(self, identity: str) -> None:
        """Sets the identity; for a database that is created again at each start of its deployment's Control."""
        with self.write() as connection:
            connection.execute(update(schema.deployment).values(identity=identity))
        self.identity = identity

    def can_reopen(self) -> bool:
        """Whether the database under this name is intact and has the same identity. Changes nothing in it.

        If it is, the write-ahead log of the earlier file is renamed, because it does not belong to this one.
        """
        if self._file is None:
            with self.read() as connection:
                return bool(connection.execute(text("SELECT identity FROM deployment")).scalar() == self.identity)
        if not self._file.holds(self.identity):
            return False
        self._file.set_log_aside()
        return True

    def advance_policies(self, above: int) -> int:
        """Numbers later policies above one that Routers have applied. Needed after an older database was restored.

        Returns:
            The current policy's number.
        """
        with self.write() as connection:
            count = head_of(connection).count
            offset = int(connection.execute(select(schema.deployment.c.policy_offset)).scalar_one())
            if count + offset <= above:
                offset = above + 1 - count
                connection.execute(update(schema.deployment).values(policy_offset=offset))
            return count + offset

    def _check(self, connection: Connection) -> None:
        if self._file is not None:
            self._file.check()
            self._file.check_log()
        identity = connection.execute(text("SELECT identity FROM deployment")).scalar()
        if identity != self.identity:
            raise RolloutDatabaseLostError(
                f"another deployment's database is in the place of {self.name}: bring back this system's own"
            )
        seen = self._seen
        if seen is not None and hash_at(connection, seen.count) != seen.hash:
            raise RolloutDatabaseLostError(
                f"the rollouts' database {self.name} was replaced by an older or another state while it was in use: "
                "restart Control to continue from its present state"
            )

    def close(self) -> None:
        """Closes the connections."""
        self.engine.dispose()

    @property
    def _for_update(self) -> str:
        return "" if self.is_sqlite else " FOR UPDATE"

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Translates the driver's errors for operators."""
        try:
            yield
        except (DBAPIError, sqlite3.Error) as error:
            translated = explained(error, self.name, self._path, BUSY_TIMEOUT_S)
            if translated is None:
                raise
            raise translated from error

    @contextmanager
    def _exclusive(self) -> Iterator[Connection]:
        with self.engine.connect().execution_options(**{_IMMEDIATE: True}) as connection, connection.begin():
            yield connection


def _migrate(database: Database, *, create: bool) -> None:
    known = [script.revision for script in ScriptDirectory.from_config(_migrations()).walk_revisions()]
    with database._exclusive() as connection:
        if not database.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        current = MigrationContext.configure(connection).get_current_revision()
        if current is None and not create:
            raise RolloutDatabaseError(
                f"the rollouts' database {database.name} has none of its tables: restore a backup of it (`echoray "
                "experts restore`), or remove it and start with `echoray serve --begin-anew` to begin from the "
                "checkpoint's own experts"
            )
        if current is not None and current not in known:
            raise RolloutDatabaseError(
                f"the rollouts' database {database.name} has the schema {current!r}, but this version knows only up "
                f"to {known[0]!r}: a newer version wrote it. Run that version, or give another database"
            )
        if current != known[0]:
            _upgrade(connection)


def _upgrade(connection: Connection) -> None:
    config = _migrations()
    config.attributes["connection"] = connection
    with _ALEMBIC:
        command.upgrade(config, "head")


def _migrations() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except ArgumentError as error:
        raise RolloutDatabaseError(
            "the rollouts' database is no URL; give one like sqlite:////var/lib/echovlm/rollouts.db or "
            "postgresql://user@host/name"
        ) from error
    if backend == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise RolloutDatabaseError("the rollouts' database must be a file, or its state is lost with the process")
        return parsed
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    raise RolloutDatabaseError(
        f"the rollouts' database cannot be {backend!r}; SQLite (sqlite:///…) and PostgreSQL (postgresql://…) are "
        "supported"
    )


def _make_tables(url: URL) -> None:
    """Creates a complete new database, which no other process has open."""
    engine = _engine_of(url, lambda: sqlite3.connect(str(url.database)))
    try:
        with engine.connect().execution_options(**{_IMMEDIATE: True}) as connection, connection.begin():
            _upgrade(connection)
    finally:
        # Closing the last connection checkpoints the write-ahead log into the file.
        engine.dispose()


def _sqlite(url: URL, file: DatabaseFile) -> Engine:
    name = f"file:{quote(str(file.path))}?mode=rw"

    def connect() -> sqlite3.Connection:
        # Neither creates a file where the database was deleted, nor opens another one in its place.
        file.check()
        return sqlite3.connect(name, uri=True, timeout=BUSY_TIMEOUT_S, check_same_thread=False)

    engine = _engine_of(url, connect)
    _use_write_ahead_log(engine)
    return engine


def _engine_of(url: URL, connect: Callable[[], sqlite3.Connection]) -> Engine:
    engine = create_engine(url, creator=connect)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        # The driver would begin a transaction only at the first write.
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get(_IMMEDIATE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def _use_write_ahead_log(engine: Engine) -> None:
    """Readers then never wait for the writer. The mode is stored in the file, so the first process sets it."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        raw = engine.raw_connection()
        try:
            raw.cursor().execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # SQLite does not wait for this lock.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        finally:
            raw.close()


def _postgresql(url: URL) -> Engine:
    try:
        return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 10})
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise RolloutDatabaseError(
            'PostgreSQL needs the driver psycopg: pip install "echovlm-ray[postgres]"'
        ) from error
