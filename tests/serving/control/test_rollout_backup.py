"""A backup is the whole state in one file; a restore is all or nothing, and never under a running system."""

import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from echovlm_ray.config import RolloutsSection
from echovlm_ray.serving.cluster.rollout_files import DatabaseLock, RolloutFiles
from echovlm_ray.serving.control import rollout_backup
from echovlm_ray.serving.control.rollout_backup import back_up, restore
from router.errors import RolloutDatabaseError, RolloutStateError
from router.gating.expert_set import ExpertSet, ExpertSetMember
from router.rollouts.database import Database
from router.rollouts.history import Entry
from router.rollouts.records import Rollout, Snapshot
from router.rollouts.settings import RolloutPlan
from router.rollouts.states import Action
from router.rollouts.store import RolloutStore

FIRST = ExpertSet(
    backbone_digest="b" * 64,
    routing="organs",
    members=(
        ExpertSetMember(organ="heart", bundle_digest="1" * 64),
        ExpertSetMember(organ="liver", bundle_digest="2" * 64),
    ),
)
# Restores in a process of its own, which dies at one of the calls of the swap.
DYING = """
import os, signal, sys
from pathlib import Path
from echovlm_ray.serving.control import rollout_backup
from tests.serving.control.test_rollout_backup import FIRST, files_in
def die(*arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(rollout_backup.os if sys.argv[1] == "replace" else rollout_backup, sys.argv[1], die)
rollout_backup.restore(Path(sys.argv[3]), files_in(Path(sys.argv[2])), FIRST)
"""


def files_in(folder: Path) -> RolloutFiles:
    return RolloutFiles.of(RolloutsSection(database=f"sqlite:///{folder}/rollouts.db"), folder)


def stage(store: RolloutStore, digest: str, organ: str = "heart") -> None:
    with store.write() as transaction:
        transaction.stage(organ, digest, RolloutPlan(), actor="ann", reason="")


@pytest.fixture
def files(tmp_path: Path) -> RolloutFiles:
    return files_in(tmp_path)


@pytest.fixture
def store(files: RolloutFiles) -> Iterator[RolloutStore]:
    """In use for the whole test, so that what is written lies in the log beside the file."""
    database = Database(files.database)
    store = RolloutStore(database)
    store.adopt(FIRST, actor="start")
    yield store
    database.close()


def state_of(files: RolloutFiles) -> tuple[Snapshot, list[Entry], list[Rollout]]:
    database = Database(files.database)
    try:
        store = RolloutStore(database)
        assert not store.verify_history().problem
        return store.snapshot(), store.history(), store.rollouts()
    finally:
        database.close()


def backup_of(files: RolloutFiles, folder: Path) -> Path:
    """A backup of one rollout; the database then goes on with another."""
    database = Database(files.database)
    store = RolloutStore(database)
    store.adopt(FIRST, actor="start")
    stage(store, "3" * 64)
    target = folder / "backup.db"
    back_up(files, target)
    stage(store, "4" * 64, organ="liver")
    database.close()
    return target


def test_a_backup_of_a_database_in_use_has_all_that_a_copy_of_the_file_lacks(
    store: RolloutStore, files: RolloutFiles, tmp_path: Path
) -> None:
    stage(store, "3" * 64)
    shutil.copyfile(files.base, tmp_path / "copied.db")
    assert rollout_backup.check(tmp_path / "copied.db", "the copy").entries < store.head().count
    found = back_up(files, tmp_path / "backup.db")
    assert (found.entries, found.head) == (store.head().count, store.head().hash)
    assert found.size_bytes == (tmp_path / "backup.db").stat().st_size
    assert stat.S_IMODE((tmp_path / "backup.db").stat().st_mode) == 0o600
    # One file and nothing beside it.
    assert [path.name for path in tmp_path.glob("*backup*")] == ["backup.db"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    restored, kept = restore(tmp_path / "backup.db", files_in(elsewhere), FIRST)
    assert (restored.head, kept) == (found.head, None)
    assert state_of(files_in(elsewhere)) == (store.snapshot(), store.history(), store.rollouts())


def test_backups_beside_writers_are_each_of_one_moment(
    store: RolloutStore, files: RolloutFiles, tmp_path: Path
) -> None:
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            stage_and_fail(store, f"{number:064d}")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        heads = [back_up(files, tmp_path / f"backup-{number}.db").entries for number in range(5)]
    finally:
        stop.set()
        writer.join()
    assert heads == sorted(heads)


def stage_and_fail(store: RolloutStore, digest: str) -> None:
    stage(store, digest)
    with store.write() as transaction:
        (rollout, *_) = transaction.rollouts(organ="heart", limit=1)
        transaction.move(rollout, Action.FAIL, actor="ann", reason="no")


def test_a_restore_brings_everything_back_and_keeps_what_was_there(files: RolloutFiles, tmp_path: Path) -> None:
    backup = backup_of(files, tmp_path)
    later = state_of(files)
    files.policy.write_text("{}")
    restored, kept = restore(backup, files, FIRST)
    assert restored.path == files.base
    assert state_of(files) != later
    assert [rollout.digest for rollout in state_of(files)[2]] == ["3" * 64]
    assert not files.policy.exists(), "a replica that starts before Control would take it for the newest"
    assert kept is not None
    restore(kept, files, FIRST)
    assert state_of(files) == later


def test_nothing_is_restored_under_a_running_system(files: RolloutFiles, tmp_path: Path) -> None:
    backup = backup_of(files, tmp_path)
    before = state_of(files)
    lock = DatabaseLock(files.lock)
    lock.take(0)
    with pytest.raises(RolloutDatabaseError, match=r"another Control .*uses the rollouts' database.* stop that system"):
        restore(backup, files, FIRST)
    lock.release()
    assert state_of(files) == before


def test_a_backup_does_not_take_the_place_of_another_deployments_database(files: RolloutFiles, tmp_path: Path) -> None:
    backup = backup_of(files, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    backup_of(files_in(other), other)
    before = state_of(files_in(other))
    with pytest.raises(RolloutStateError, match=r"backup.db is of the deployment .*, and .*other/rollouts.db is of"):
        restore(backup, files_in(other), FIRST)
    assert state_of(files_in(other)) == before
    assert not list(other.glob("*before-restore*"))


def no_database(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to be one" * 200)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def another_program(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE things (id INTEGER)")
    connection.commit()
    connection.close()


def rewritten(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("UPDATE history SET actor = 'somebody else' WHERE sequence = 2")
    connection.commit()
    connection.close()


def newer(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("UPDATE alembic_version SET version_num = 'v9999'")
    connection.commit()
    connection.close()


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (no_database, "backup.db cannot be copied to .*: file is not a database|is no rollouts' database"),
        (truncated, "malformed|damaged"),
        (another_program, "is no rollouts' database: it has no history"),
        (empty, "is no rollouts' database: it has no history"),
        (rewritten, "history of .*backup.db does not hold together: entry 2"),
        (newer, "a newer version wrote it"),
    ],
)
def test_what_is_no_sound_backup_is_refused_and_nothing_changes(
    files: RolloutFiles, tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    backup = backup_of(files, tmp_path)
    before = state_of(files)
    harm(backup)
    with pytest.raises(RolloutDatabaseError, match=words):
        restore(backup, files, FIRST)
    assert state_of(files) == before
    assert {path.name for path in tmp_path.iterdir()} <= {
        "backup.db",
        *(files.base.name + end for end in ("", ".lock")),
    }


def test_another_checkpoints_backup_is_refused(files: RolloutFiles, tmp_path: Path) -> None:
    backup = backup_of(files, tmp_path)
    other = FIRST.model_copy(update={"backbone_digest": "c" * 64})
    with pytest.raises(RolloutStateError, match=r"backup\.db belongs to the backbone bbbbbbbbbbbb.*is cccccccccccc"):
        restore(backup, files, other)


@pytest.mark.parametrize(("call", "restored"), [("_keep_aside", False), ("replace", False), ("_sync_folder", True)])
def test_a_restore_that_is_killed_leaves_one_state_or_the_other(
    files: RolloutFiles, tmp_path: Path, call: str, restored: bool
) -> None:
    backup = backup_of(files, tmp_path)
    before = state_of(files)
    died = subprocess.run(
        [sys.executable, "-c", DYING, call, str(tmp_path), str(backup)], cwd=Path(__file__).parents[3]
    )
    assert died.returncode == -signal.SIGKILL
    assert (state_of(files) != before) is restored
    # What was left behind does not hinder the next one.
    restore(backup, files, FIRST)
    assert [rollout.digest for rollout in state_of(files)[2]] == ["3" * 64]


def test_a_damaged_database_is_replaced_and_kept(files: RolloutFiles, tmp_path: Path) -> None:
    backup = backup_of(files, tmp_path)
    truncated(files.base)
    damaged = files.base.read_bytes()
    with pytest.raises(RolloutDatabaseError):
        back_up(files, tmp_path / "second.db")
    assert not (tmp_path / "second.db").exists()
    _, kept = restore(backup, files, FIRST)
    assert kept is not None
    assert kept.read_bytes() == damaged
    assert [rollout.digest for rollout in state_of(files)[2]] == ["3" * 64]


def test_a_full_disk_leaves_no_backup(
    store: RolloutStore, files: RolloutFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sqlite3.connect

    def small(database: object, *arguments: object, **named: object) -> sqlite3.Connection:
        connection = real(database, *arguments, **named)  # type: ignore[call-overload]
        if str(database).endswith(rollout_backup.PARTIAL_SUFFIX):
            connection.execute("PRAGMA max_page_count = 3")
        return connection  # type: ignore[no-any-return]

    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(RolloutDatabaseError, match=r"cannot be copied to .*: database or disk is full"):
        back_up(files, tmp_path / "backup.db")
    assert not list(tmp_path.glob("*backup*"))
    assert not list(tmp_path.glob(".*partial*"))


def test_a_backup_is_never_overwritten(store: RolloutStore, files: RolloutFiles, tmp_path: Path) -> None:
    back_up(files, tmp_path / "backup.db")
    content = (tmp_path / "backup.db").read_bytes()
    with pytest.raises(FileExistsError, match="never overwritten"):
        back_up(files, tmp_path / "backup.db")
    assert (tmp_path / "backup.db").read_bytes() == content


def test_what_there_is_to_do_is_said_where_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(RolloutDatabaseError, match="there is no rollouts' database"):
        back_up(files_in(tmp_path), tmp_path / "backup.db")
    elsewhere = RolloutFiles.of(RolloutsSection(database="postgresql://ann@db/rollouts"), tmp_path)
    with pytest.raises(RolloutDatabaseError, match="use `pg_dump"):
        back_up(elsewhere, tmp_path / "backup.db")
    with pytest.raises(RolloutDatabaseError, match="use `pg_restore"):
        restore(tmp_path / "backup.db", elsewhere, FIRST)
    assert os.listdir(tmp_path) == []
