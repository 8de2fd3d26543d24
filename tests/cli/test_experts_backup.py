"""`echoray experts backup` and `restore` as an operator types them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from echovlm_ray.checkpoint.layout import read_index
from echovlm_ray.cli.experts import app
from echovlm_ray.cli.state import announced
from echovlm_ray.config import RolloutsSection
from echovlm_ray.serving.cluster.rollout_files import DatabaseLock, RolloutFiles
from router.rollouts.database import Database
from router.rollouts.store import RolloutStore


def echoray(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def done(*arguments: object) -> str:
    result = echoray(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    result = echoray(*arguments)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, "one line"
    return result.stderr


@pytest.fixture
def checkpoint(demo_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint with a state of its own."""
    own = tmp_path / "checkpoint"
    own.mkdir()
    for path in demo_checkpoint.iterdir():
        if path.name != "rollouts":
            (own / path.name).symlink_to(path)
    database = Database(RolloutFiles.of(RolloutsSection(), own).database)
    RolloutStore(database).adopt(read_index(own).expert_set(), actor="start")
    database.close()
    return own


def test_there_and_back(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "monday.db"
    shown = json.loads(done("backup", file, "--checkpoint", checkpoint, "--json"))
    assert shown["database"] == str(checkpoint / "rollouts" / "rollouts.db")
    assert (shown["file"], shown["entries"], shown["bytes"]) == (str(file), 1, file.stat().st_size)
    text = done("restore", file, "--checkpoint", checkpoint)
    assert f"1 entries of history, head {shown['head']}" in text
    (kept,) = (checkpoint / "rollouts").glob("rollouts.db.before-restore-*")
    assert str(kept) in text
    again = json.loads(done("restore", file, "--checkpoint", checkpoint, "--json"))
    assert again["head"] == shown["head"]


def test_what_goes_wrong_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "monday.db"
    done("backup", file, "--checkpoint", checkpoint)
    assert "exists, and a backup is never overwritten" in refused("backup", file, "--checkpoint", checkpoint)
    assert "is no file" in refused("restore", tmp_path / "nosuch.db", "--checkpoint", checkpoint)
    lock = DatabaseLock(checkpoint / "rollouts" / "rollouts.db.lock")
    lock.take(0)
    assert "stop that system" in refused("restore", file, "--checkpoint", checkpoint)
    lock.release()
    (tmp_path / "other.yaml").write_text("rollouts: {database: postgresql://ann@db/rollouts}\n")
    text = refused("backup", tmp_path / "b.db", "--config", tmp_path / "other.yaml", "--checkpoint", checkpoint)
    assert "use `pg_dump" in text


def test_without_options_it_is_the_running_system(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    database = str(checkpoint / "rollouts" / "rollouts.db")
    with announced("elsewhere", "control", "gateway", name="team-a", database=database):
        assert json.loads(done("backup", "a.db", "--json"))["database"] == database
        assert json.loads(done("backup", "b.db", "--name", "team-a", "--json"))["database"] == database
        refusal = echoray("backup", "c.db", "--name", "team-b")
        assert (refusal.exit_code, "team-a" in refusal.stderr) == (2, True)
    with announced("elsewhere", "control", "gateway"):
        assert "pg_dump" in refused("backup", "c.db")
    # None runs: it is that of the defaults.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert "/echovlm-ray/demo-" in refused("backup", "c.db")
