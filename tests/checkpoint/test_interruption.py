"""A split or merge that is stopped half-way leaves nothing that looks like a checkpoint."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from echovlm_ray.checkpoint.atomic import new_folder, require_space
from echovlm_ray.checkpoint.layout import InvalidCheckpointError
from tests.checkpoint.support import make_split

# Starts a command and stops in the middle of it, when a third of the bytes are written, until it is signalled.
STALLED = """
import sys, time
from pathlib import Path
import echovlm_ray.cli.checkpoint as cli
from contextlib import contextmanager

@contextmanager
def stalling(what):
    total, done = [0], [0]
    def advance(count):
        done[0] += count
        if done[0] * 3 > total[0]:
            print("stalled", flush=True)
            time.sleep(60)
    yield (lambda count: total.__setitem__(0, count)), advance

cli.byte_progress = stalling
cli.app(sys.argv[1:])
"""


@pytest.mark.parametrize("command", ["split", "merge"])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopping_half_way(base_checkpoint: Path, tmp_path: Path, command: str, stop: signal.Signals) -> None:
    source = base_checkpoint
    if command == "merge":
        source = tmp_path / "source"
        make_split(base_checkpoint, source)
    work = tmp_path / "work"
    work.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", STALLED, command, str(source), str(work / "result")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "stalled\n"
    assert list(work.iterdir()) != []
    process.send_signal(stop)
    _, errors = process.communicate(timeout=30)
    left = {path.name for path in work.rglob("*")}
    if stop == signal.SIGKILL:
        # Nothing could tidy up; what is left is hidden and is no checkpoint.
        assert all(path.name.startswith(".result.partial-") for path in work.iterdir())
        assert not left & {"echovlm.json", "result"}
        # A merged model's config.json comes last too.
        assert command == "split" or "config.json" not in left
    else:
        assert process.returncode == 130
        assert errors == "error: interrupted; nothing was left behind\n"
        assert left == set()


def test_a_name_taken_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def race() -> None:
        with new_folder(tmp_path / "result") as partial:
            (partial / "ours").touch()
            (tmp_path / "result").mkdir()
            (tmp_path / "result" / "theirs").touch()

    with pytest.raises(InvalidCheckpointError, match="not empty"):
        race()
    assert [path.name for path in tmp_path.rglob("*")] == ["result", "theirs"]


def test_parents_are_made_and_the_folder_is_as_readable_as_any(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b" / "result") as partial:
        (partial / "file").touch()
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "a" / "b" / "result").stat().st_mode == plain.stat().st_mode


def test_a_full_disk_is_seen_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpointError, match="choose another disk"):
        require_space(tmp_path / "a" / "b", 10**18)
    require_space(tmp_path / "a" / "b", 1)
