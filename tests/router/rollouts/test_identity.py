"""A database has its deployment's identity, and nothing is written to another one than was opened."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from router.errors import RolloutDatabaseError, RolloutDatabaseLostError
from router.rollouts.database import Database
from router.rollouts.settings import RolloutPlan
from router.rollouts.store import RolloutStore
from tests.router.rollouts.support import digest, set_of


def opened(path: Path, *, create: bool = True) -> RolloutStore:
    return RolloutStore(Database(f"sqlite:///{path}", create=create))


def stage(store: RolloutStore, name: str = "new") -> None:
    with store.write() as transaction:
        transaction.stage("heart", digest(name), RolloutPlan(), actor="ann", reason="")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rollouts.db"


@pytest.fixture
def running(path: Path) -> RolloutStore:
    store = opened(path)
    store.adopt(set_of(heart="a"), actor="start")
    return store


def test_an_identity_is_random_and_stays(make_empty_url: Callable[[], str]) -> None:
    urls = [make_empty_url(), make_empty_url()]
    identities = []
    for url in urls:
        first, again = Database(url), Database(url, create=False)
        assert first.identity == again.identity
        identities.append(first.identity)
        first.close()
        again.close()
    assert len(set(identities)) == 2
    assert all(len(identity) == 32 for identity in identities)


def test_the_policy_carries_it(store: RolloutStore) -> None:
    policy = store.policy()
    assert policy.identity == store.database.identity
    assert policy.content_digest == store.policy().content_digest
    stage(store)
    with store.write() as transaction:
        transaction.retire_organ("liver", actor="ann", reason="")
    assert policy.content_digest != store.policy().content_digest


def test_policies_are_numbered_above_what_routers_have(store: RolloutStore) -> None:
    before = store.policy().version
    assert store.database.advance_policies(before - 1) == before
    assert store.database.advance_policies(before + 40) == before + 41
    assert store.policy().version == before + 41
    stage(store)
    assert store.policy().version == before + 42
    assert store.head().count == before + 1


def test_a_missing_database_is_made_only_where_that_is_asked_for(path: Path) -> None:
    with pytest.raises(RolloutDatabaseError, match=r"does not exist.*--begin-anew"):
        opened(path, create=False)
    assert not path.exists()


@pytest.mark.parametrize("create", [True, False])
def test_an_empty_file_is_refused(path: Path, create: bool) -> None:
    path.touch()
    with pytest.raises(RolloutDatabaseError, match=r"is an empty file.*restore.*remove it"):
        opened(path, create=create)
    assert path.stat().st_size == 0


@pytest.mark.parametrize("create", [True, False])
def test_a_file_without_tables_is_refused(path: Path, create: bool) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE other (id INTEGER)")
    connection.execute("DROP TABLE other")
    connection.commit()
    connection.close()
    with pytest.raises(RolloutDatabaseError, match=r"none of its tables.*restore"):
        opened(path, create=create)


def test_another_programs_database_is_left_as_it_is(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE patients (id INTEGER)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(RolloutDatabaseError, match=r"another program's database, with the table 'patients'"):
        opened(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_link_to_nothing_is_told_as_one(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere.db"))
    with pytest.raises(RolloutDatabaseError, match=r"is a link to .*elsewhere\.db, which does not exist"):
        opened(path)


def test_a_log_that_was_written_beside_another_database_breaks_no_backup(path: Path) -> None:
    """A system was killed, and a backup copied to where its database was; its log is still there."""
    log = path.with_name(f"{path.name}-wal")
    store = opened(path)
    store.adopt(set_of(liver="a"), actor="start")
    with store.database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    backup = path.read_bytes()
    for number in range(60):
        if number == 50:
            with store.database.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(RESTART)")
        with store.write() as transaction:
            transaction.retire_version("liver", digest(f"{number}"), actor="ann", reason="x" * 400)
    written = log.read_bytes()
    store.database.close()
    assert written
    path.write_bytes(backup)
    log.write_bytes(written)
    with pytest.raises(RolloutDatabaseError, match=r"broken together with rollouts\.db-wal.*remove"):
        opened(path)
    assert (path.read_bytes(), log.read_bytes()) == (backup, written)
    log.unlink()
    assert opened(path).head().count == 1


def test_a_killed_systems_own_log_is_taken_up(path: Path) -> None:
    log = path.with_name(f"{path.name}-wal")
    store = opened(path)
    store.adopt(set_of(heart="a"), actor="start")
    with store.database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    stage(store)
    left = path.read_bytes(), log.read_bytes()
    store.database.close()
    path.write_bytes(left[0])
    log.write_bytes(left[1])
    assert opened(path).head().count == 2


def test_a_database_appears_whole_and_leaves_nothing_beside_it(path: Path) -> None:
    opened(path).database.close()
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def removed(path: Path) -> None:
    path.unlink()


def all_removed(path: Path) -> None:
    for found in path.parent.iterdir():
        found.unlink()


def folder_removed(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


def emptied(path: Path) -> None:
    path.unlink()
    path.touch()


def copied_over(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


def log_removed(path: Path) -> None:
    path.with_name(f"{path.name}-wal").unlink()


def another_deployments(path: Path) -> None:
    other = path.with_name("other.db")
    opened(other).database.close()
    other.replace(path)


LOSSES = [removed, all_removed, folder_removed, emptied, copied_over, log_removed, another_deployments]


@pytest.mark.parametrize("lose", LOSSES)
def test_nothing_is_acknowledged_that_would_be_lost(
    running: RolloutStore, path: Path, lose: Callable[[Path], None]
) -> None:
    stage(running, "one")
    lose(path)
    with pytest.raises(RolloutDatabaseLostError), running.write() as transaction:
        transaction.retire_organ("heart", actor="ann", reason="")
    with pytest.raises(RolloutDatabaseLostError):
        running.database.check()


@pytest.mark.parametrize("lose", [removed, emptied])
def test_what_is_lost_inside_a_transaction_is_not_committed(
    running: RolloutStore, path: Path, lose: Callable[[Path], None]
) -> None:

    def write() -> None:
        with running.write() as transaction:
            transaction.stage("heart", digest("new"), RolloutPlan(), actor="ann", reason="")
            lose(path)

    with pytest.raises(RolloutDatabaseLostError):
        write()


def test_an_older_state_in_its_place_is_noticed(running: RolloutStore) -> None:
    stage(running)
    with running.database.engine.begin() as connection:
        # As a copy over the same file, or a server that was set back.
        connection.exec_driver_sql("DELETE FROM history WHERE sequence > 1")
        connection.exec_driver_sql("UPDATE history_head SET count = 1, hash = (SELECT hash FROM history)")
    with pytest.raises(RolloutDatabaseLostError, match="older or another state"):
        stage(running, "other")
    assert running.database.can_reopen()


def test_only_a_sound_database_of_the_same_identity_can_take_its_place(running: RolloutStore, path: Path) -> None:
    stage(running)
    backup = path.with_name("backup.db")
    with sqlite3.connect(path) as source, sqlite3.connect(backup) as target:
        source.backup(target)
    path.unlink()
    assert not running.database.can_reopen()
    assert not path.exists()
    path.write_bytes(backup.read_bytes()[: backup.stat().st_size // 2])
    assert not running.database.can_reopen()
    another_deployments(path)
    assert not running.database.can_reopen()
    os.replace(backup, path)
    assert running.database.can_reopen()
    with pytest.raises(RolloutDatabaseLostError, match="another file was put in the place"):
        stage(running, "more")


def test_the_lost_databases_log_is_not_taken_for_the_backups(running: RolloutStore, path: Path) -> None:
    backup = path.with_name("backup.db")
    with sqlite3.connect(path) as source, sqlite3.connect(backup) as target:
        source.backup(target)
    stage(running)
    os.replace(backup, path)
    assert running.database.can_reopen()
    again = opened(path, create=False)
    assert again.head().count == 1
    assert again.verify_history().intact
    again.database.close()
    running.database.close()
