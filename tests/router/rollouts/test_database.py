import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from router.errors import RolloutDatabaseError
from router.rollouts import schema
from router.rollouts.database import Database
from router.rollouts.settings import RolloutPlan
from router.rollouts.store import RolloutStore
from tests.router.rollouts.support import digest, set_of


def test_the_migrations_make_exactly_the_tables_of_the_schema(make_empty_url: Callable[[], str]) -> None:
    database = Database(make_empty_url())
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    database.close()


def test_opening_again_changes_nothing(make_empty_url: Callable[[], str]) -> None:
    url = make_empty_url()
    first = Database(url)
    RolloutStore(first).adopt(set_of(heart="a"), actor="start")
    first.close()
    again = Database(url)
    assert RolloutStore(again).snapshot().organs[0].stable_digest == digest("a")
    again.close()


def test_a_newer_schema_is_refused_in_words(make_empty_url: Callable[[], str]) -> None:
    url = make_empty_url()
    database = Database(url)
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(RolloutDatabaseError, match=r"schema '9999'.*knows only up to '0005'.*newer version"):
        Database(url)


def test_several_that_start_at_once_make_one_database(make_empty_url: Callable[[], str]) -> None:
    url = make_empty_url()
    barrier = threading.Barrier(6)

    def start(number: int) -> bool:
        barrier.wait()
        database = Database(url)
        taken = RolloutStore(database).adopt(set_of(heart="a"), actor=f"starter {number}")
        database.close()
        return taken

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(start, range(6))) == [False] * 5 + [True]


def test_processes_that_start_at_once_make_one_database(make_empty_url: Callable[[], str]) -> None:
    url = make_empty_url()
    code = f"from router.rollouts.database import Database; Database({url!r}).close()"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, cwd=Path(__file__).parents[3])
        for _ in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    database = Database(url)
    with database.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM history_head")).scalar() == 1
    database.close()


def test_a_reader_sees_one_moment_and_does_not_wait_for_the_writer(store: RolloutStore) -> None:
    with store.read() as reading:
        before = reading.snapshot()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(_stage, store, "heart", "new").result(timeout=10)
        assert reading.snapshot() == before
    assert store.snapshot().candidate("heart") is not None


def test_writers_take_turns_and_leave_no_gap(store: RolloutStore) -> None:
    start = store.head().count

    def write(number: int) -> None:
        with store.write() as transaction:
            transaction.retire_version("heart", digest(str(number)), actor="many", reason="")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    assert store.head().count == start + 40
    assert store.verify_history().intact


def test_what_fails_inside_a_transaction_leaves_nothing(store: RolloutStore) -> None:
    before = store.head(), store.snapshot()

    def fail_after_staging() -> None:
        with store.write() as transaction:
            transaction.stage("heart", digest("new"), RolloutPlan(), actor="a", reason="")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_staging()
    assert (store.head(), store.snapshot()) == before


def test_the_database_itself_refuses_a_second_flight(store: RolloutStore) -> None:
    _stage(store, "heart", "one")
    _stage(store, "liver", "one")
    with pytest.raises(IntegrityError):
        _stage(store, "heart", "two")


def test_sqlite_is_durable_and_writes_ahead(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/deep/folder/rollouts.db")
    with database.read() as connection:
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA busy_timeout")).scalar() == 10_000
    database.close()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite://", "must be a file"),
        ("sqlite:///:memory:", "must be a file"),
        ("mysql://host/name", "'mysql'.*SQLite.*PostgreSQL"),
        ("rollouts.db", "is no URL"),
        ("postgresql://me:secret@/none?host=/nowhere", "cannot be reached: connection"),
        ("sqlite:////proc/rollouts.db", "cannot be made: .*set rollouts.database to a file"),
    ],
)
def test_a_database_that_cannot_be_is_told_in_words(url: str, words: str) -> None:
    with pytest.raises(RolloutDatabaseError, match=words) as raised:
        Database(url)
    assert "secret" not in str(raised.value)


def test_a_file_that_is_no_database_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "rollouts.db").write_text("this is a letter, and no database at all" * 10)
    with pytest.raises(RolloutDatabaseError, match="is damaged: file is not a database"):
        Database(f"sqlite:///{tmp_path}/rollouts.db")


def test_a_lock_held_by_another_program_is_waited_for(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/rollouts.db")
    other = sqlite3.connect(tmp_path / "rollouts.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.3, lambda: other.execute("COMMIT")).start()
    RolloutStore(database).adopt(set_of(heart="a"), actor="start")
    database.close()


def _stage(store: RolloutStore, organ: str, name: str) -> None:
    with store.write() as transaction:
        transaction.stage(organ, digest(name), RolloutPlan(), actor="a", reason="")
