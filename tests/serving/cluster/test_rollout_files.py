import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from echovlm_ray.config import RolloutsSection
from echovlm_ray.serving.cluster.known_policy import (
    ForeignPolicyError,
    ask_policy,
    check_identity,
    read_policy,
    wanted_digests,
    write_policy,
)
from echovlm_ray.serving.cluster.rollout_files import DatabaseLock, RolloutFiles
from experts.transport.inner_channel import PLAIN_CHANNELS
from protos import control_pb2
from router.errors import RolloutDatabaseError


def test_by_default_all_lies_in_the_checkpoints_folder(tmp_path: Path) -> None:
    files = RolloutFiles.of(RolloutsSection(), tmp_path)
    assert files.database == f"sqlite:///{tmp_path}/rollouts/rollouts.db"
    assert {files.policy.parent, files.incoming.parent, files.lock.parent} == {tmp_path / "rollouts"}
    assert files.is_new
    # A replica gets what the driver found, and finds the same.
    again = RolloutFiles.of(RolloutsSection(database=files.database), tmp_path / "elsewhere")
    assert again == files


def test_a_read_only_checkpoint_leaves_it_to_the_users_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    places = {RolloutFiles.of(RolloutsSection(), tmp_path / name / "demo").base for name in ("a", "b")}
    assert len(places) == 2
    assert all(tmp_path / "state" / "echovlm-ray" in place.parents for place in places)


def test_two_postgresql_databases_share_no_files_and_a_password_changes_nothing(tmp_path: Path) -> None:
    def base(url: str) -> Path:
        files = RolloutFiles.of(RolloutsSection(database=url), tmp_path)
        assert files.database == url
        assert not files.is_new
        return files.base

    one = base("postgresql://me@host/one")
    assert one == base("postgresql://me:secret@host/one")
    assert one != base("postgresql://me@host/two")
    assert "secret" not in str(one)


def test_another_kind_of_database_is_refused() -> None:
    with pytest.raises(ValueError, match="sqlite:////var"):
        RolloutsSection(database="mysql://host/name")


HOLD = """
import sys, time
from pathlib import Path
from echovlm_ray.serving.cluster.rollout_files import DatabaseLock
DatabaseLock(Path(sys.argv[1])).take(0)
print("held", flush=True)
time.sleep(60)
"""


def test_one_control_holds_a_database_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rollouts.db.lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RolloutDatabaseError, match=r"rollouts\.database"):
            DatabaseLock(path).take(0.2)
        holder.send_signal(signal.SIGKILL)
        lock = DatabaseLock(path)
        lock.take(10)
        lock.release()
        lock.release()
        DatabaseLock(path).take(0)


def test_the_file_of_a_lock_goes_with_it_and_one_that_is_gone_keeps_no_process_out(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.db.lock"
    first, second = DatabaseLock(path), DatabaseLock(path)
    first.take(0)
    assert path.read_text() == str(os.getpid())
    path.unlink()
    second.take(0)
    first.release()
    with pytest.raises(RolloutDatabaseError, match=f"process {os.getpid()}"):
        DatabaseLock(path).take(0)
    second.release()
    assert not list(tmp_path.iterdir())


def test_a_policy_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "policy.json"
    assert read_policy(path) is None
    policy = control_pb2.TrafficPolicy(
        version=7,
        stable=control_pb2.ExpertSet(
            id="s",
            members=[control_pb2.ExpertSetMember(organ=organ, bundle_digest=organ[0]) for organ in ("heart", "liver")],
        ),
        candidates=[control_pb2.CandidateTraffic(organ="heart", digest="n", mode="canary", percent=0.5)],
        versions={"h": "1.0.0"},
    )
    write_policy(path, policy)
    assert read_policy(path) == policy
    assert wanted_digests(policy, "heart") == ["h", "n"]
    assert wanted_digests(policy, "lung") == []
    path.write_text('{"version": "x"}')
    assert read_policy(path) is None
    assert [found.name for found in path.parent.iterdir()] == ["policy.json"]


def test_a_control_that_is_away_is_not_waited_for() -> None:
    assert ask_policy(["127.0.0.1:1"], PLAIN_CHANNELS, timeout_s=5) is None
    assert ask_policy([], PLAIN_CHANNELS) is None


def test_a_policy_of_another_deployment_is_refused() -> None:
    ours, theirs = "a" * 32, "b" * 32
    check_identity(control_pb2.TrafficPolicy(identity=ours), ours, "the file")
    # From before there were identities; and where a part does not know its own.
    check_identity(control_pb2.TrafficPolicy(), ours, "the file")
    check_identity(control_pb2.TrafficPolicy(identity=theirs), "", "the file")
    with pytest.raises(ForeignPolicyError, match=r"the file is of the deployment bbbb.*--take-over"):
        check_identity(control_pb2.TrafficPolicy(identity=theirs), ours, "the file")


def test_a_policy_that_finds_no_room_leaves_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.db.policy.json"
    write_policy(path, control_pb2.TrafficPolicy(version=7))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
    try:
        for _ in range(3):
            with pytest.raises(OSError, match="File too large"):
                write_policy(path, control_pb2.TrafficPolicy(version=8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [path]
    found = read_policy(path)
    assert found is not None
    assert found.version == 7
