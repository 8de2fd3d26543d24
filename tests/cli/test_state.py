import os
import subprocess
import sys
from pathlib import Path

import pytest

from echovlm_ray.cli.state import announced, claimed, running_systems

CLAIM = """
import sys
from echovlm_ray.cli.state import claimed
with claimed({"port 50051": "set gateway.port to another port"}):
    print("claimed", flush=True)
    sys.stdin.read()
"""


# As the process that serves does, below the one that holds the claim.
CLAIM_AND_LEAVE_A_CHILD = """
import os, signal, sys
from echovlm_ray.cli.state import claimed
with claimed({"port 50051": ""}):
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_what_another_start_has_is_refused_with_its_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CLAIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        with (
            pytest.raises(ValueError, match="with port 50051") as refused,
            claimed({"port 50051": "set it to another"}),
        ):
            raise AssertionError
        assert f"(process {other.pid})" in str(refused.value)
        assert f"`echoray stop --pid {other.pid}` ends it; or set it to another" in str(refused.value)
        with claimed({"port 50061": ""}):
            pass
        other.kill()
        other.communicate()
    # However it ended, what it had is free.
    with claimed({"port 50051": ""}):
        pass


def test_nothing_is_left_of_what_was_given_back(tmp_path: Path) -> None:
    with claimed({"port 50051": "", "port 50052": ""}), announced("checkpoint", "control", "gateway"):
        (folder,) = tmp_path.iterdir()
        assert len(list(folder.iterdir())) == 3
    assert not list(tmp_path.iterdir())


def test_of_several_resources_all_are_given_back_where_one_is_taken() -> None:
    with claimed({"second": ""}):
        with pytest.raises(ValueError, match=f"process {os.getpid()}"), claimed({"first": "", "second": ""}):
            raise AssertionError
        with claimed({"first": ""}):
            pass


def test_what_a_killed_one_left_is_removed_by_the_next_command_that_looks(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CLAIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        assert not running_systems()
        assert len(list(tmp_path.rglob("*.claim"))) == 1, "it is in use"
        other.kill()
        other.communicate()
    assert len(list(tmp_path.rglob("*.claim"))) == 1
    assert not running_systems()
    assert not list(tmp_path.iterdir())


def test_what_the_child_of_a_killed_one_still_has_is_refused_without_a_process_that_is_gone() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CLAIM_AND_LEAVE_A_CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(ValueError, match="was killed, and what it started still ends"), claimed({"port 50051": ""}):
            raise AssertionError
        other.communicate()
    with claimed({"port 50051": ""}):
        pass
