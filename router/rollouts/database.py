"""Opens the rollouts' database: SQLite in a file, or PostgreSQL by URL; brings its tables up to date.

One writer at a time: SQLite by `BEGIN IMMEDIATE`, PostgreSQL by a lock on the history's head row.
"""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from router.errors import RolloutDatabaseError
from router.rollouts.database_errors import first_line, in_words

# Below what operators' commands wait, so that they hear why.
BUSY_TIMEOUT_S = 10.0
MIGRATIONS = Path(__file__).parent / "migrations"
# Any number that no other program uses for the same purpose in the same PostgreSQL database.
ADVISORY_LOCK = 0x6563686F766C6D
_IMMEDIATE = "rollouts_immediate"


class Database:
    """A database whose tables are current. Every method may be called from any thread."""

    def __init__(self, url: str) -> None:
        """Connects, and migrates what is older; two that start at once wait for each other.

        Args:
            url: "sqlite:////var/lib/echovlm/rollouts.db" (the folder is made), or "postgresql://user@host/name".

        Raises:
            RolloutDatabaseError: out of reach, of a newer version than this code, or a kind that is not supported.
        """
        parsed = _parse(url)
        self.name = parsed.render_as_string(hide_password=True)
        self._path = Path(str(parsed.database)) if parsed.get_backend_name() == "sqlite" else None
        try:
            with self._in_words():
                self.engine = _sqlite(parsed) if self._path is not None else _postgresql(parsed)
                self._migrate()
        except (DBAPIError, sqlite3.Error) as error:
            raise RolloutDatabaseError(
                f"the rollouts' database {self.name} cannot be opened: {first_line(error)}; check that it is there, "
                "that its folder may be written, and that the credentials are right"
            ) from error

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one moment of the database, whatever is written meanwhile.

        Raises:
            RolloutDatabaseError: it is locked, out of reach or damaged; the text says what to do.
        """
        options: dict[str, Any] = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        with self._in_words(), self.engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that excludes every other writer, of this and of other processes; committed at the end.

        Raises:
            RolloutDatabaseError: it is locked, full, out of reach or damaged; nothing was changed, and the text says
                what to do.
        """
        with self._in_words(), self._exclusive() as connection:
            # Under READ COMMITTED, all that follows sees what the last writer left.
            connection.execute(text("SELECT id FROM history_head WHERE id = 1" + self._for_update))
            yield connection

    def close(self) -> None:
        """Closes the connections."""
        self.engine.dispose()

    @property
    def _for_update(self) -> str:
        return "" if self.is_sqlite else " FOR UPDATE"

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """Raises what the driver says of the database in words for operators."""
        try:
            yield
        except (DBAPIError, sqlite3.Error) as error:
            told = in_words(error, self.name, self._path, BUSY_TIMEOUT_S)
            if told is None:
                raise
            raise told from error

    @contextmanager
    def _exclusive(self) -> Iterator[Connection]:
        with self.engine.connect().execution_options(**{_IMMEDIATE: True}) as connection, connection.begin():
            yield connection

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        known = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
        with self._exclusive() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
            current = MigrationContext.configure(connection).get_current_revision()
            if current is not None and current not in known:
                raise RolloutDatabaseError(
                    f"the rollouts' database {self.name} has the schema {current!r}, but this version knows only up "
                    f"to {known[0]!r}: a newer version wrote it. Run that version, or give another database"
                )
            if current != known[0]:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")


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


def _sqlite(url: URL) -> Engine:
    path = Path(str(url.database))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RolloutDatabaseError(f"the folder of the rollouts' database {path} cannot be made: {error}") from error
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        # The driver must not begin transactions by itself: it would begin them only at the first write.
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get(_IMMEDIATE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    _use_write_ahead_log(engine)
    return engine


def _use_write_ahead_log(engine: Engine) -> None:
    """Readers then never wait for the writer. Kept in the file, so the first of several starters sets it."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        raw = engine.raw_connection()
        try:
            raw.cursor().execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # SQLite does not wait for this lock by itself.
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
