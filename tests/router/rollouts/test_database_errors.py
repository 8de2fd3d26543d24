"""What operators read when the database cannot go on. Each case is SQLite's own error, of a real file."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event

from router.errors import RolloutDatabaseError, RolloutDatabaseFullError, RolloutDatabaseUnavailableError
from router.rollouts import database as databases
from router.rollouts.database import Database
from router.rollouts.database_errors import lock_holders
from router.rollouts.operations import RolloutOperations
from router.rollouts.settings import RolloutSettings
from router.rollouts.store import RolloutStore
from tests.router.rollouts.support import FolderFleet, set_of

HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rollouts.db"


@pytest.fixture
def database(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.setattr(databases, "BUSY_TIMEOUT_S", 0.2)
    opened = Database(f"sqlite:///{path}")
    RolloutStore(opened).adopt(set_of(breast="a", heart="b"), actor="start")
    yield opened
    opened.close()


def operations(database: Database, tmp_path: Path) -> RolloutOperations:
    return RolloutOperations(RolloutStore(database), FolderFleet(tmp_path / "fleet"), RolloutSettings())


def with_pragma(database: Database, pragma: str) -> None:
    database.close()

    @event.listens_for(database.engine, "connect")
    def prepare(connection: sqlite3.Connection, _: object) -> None:
        connection.execute(pragma)


def test_a_lock_names_the_process_that_holds_it(database: Database, path: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RolloutDatabaseUnavailableError) as locked:
            operations(database, tmp_path).retire_organ("heart", actor="ann")
        assert lock_holders(path) == [holder.pid]
        with pytest.raises(RolloutDatabaseUnavailableError, match="is locked by process"):
            Database(f"sqlite:///{path}")
        holder.communicate()
    text = str(locked.value)
    assert f"{path} is locked by process {holder.pid}" in text
    assert "nothing was changed" in text
    assert f"`fuser {path}`" in text
    assert operations(database, tmp_path).retire_organ("heart", actor="ann").changed


def test_a_full_disk_is_told_with_its_folder(database: Database, path: Path, tmp_path: Path) -> None:
    with_pragma(database, "PRAGMA max_page_count = 1")

    def fill() -> None:
        for number in range(200):
            operations(database, tmp_path).stage("heart", f"{number:064x}", actor="ann", reason="x" * 500)
            operations(database, tmp_path).rollback("heart", actor="ann", reason="x" * 500)

    with pytest.raises(RolloutDatabaseFullError) as full:
        fill()
    assert "the disk is full" in str(full.value)
    assert f"Make room in {tmp_path}" in str(full.value)


def test_a_database_that_may_not_be_written_is_told(database: Database, path: Path, tmp_path: Path) -> None:
    with_pragma(database, "PRAGMA query_only = ON")
    with pytest.raises(RolloutDatabaseError, match=r"cannot be written, and nothing was changed: attempt to write a"):
        operations(database, tmp_path).retire_organ("heart", actor="ann")


def test_a_database_that_is_none_is_told(path: Path) -> None:
    path.write_bytes(b"this is no database, but it is long enough to be one" * 100)
    with pytest.raises(RolloutDatabaseError, match=f"{path} is damaged: file is not a database"):
        Database(f"sqlite:///{path}")


def test_a_folder_in_its_place_is_told(path: Path) -> None:
    path.mkdir()
    with pytest.raises(RolloutDatabaseError, match=rf"{path} is a folder: set rollouts\.database"):
        Database(f"sqlite:///{path}")


def test_a_lock_of_our_own_is_no_other_process(database: Database, path: Path) -> None:
    with database.write():
        assert os.getpid() not in lock_holders(path)
