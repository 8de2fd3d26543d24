import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from echovlm_ray.serving.cluster.ray_folder import logs_of, logs_of_this_process, ray_folder
from experts.private_folder import MAX_SOCKET_PATH

LONGEST_SOCKET = "session_2026-11-30_04-37-08_550449_4194304/sockets/plasma_store.1"


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # pytest's own folders have too long names for sockets.
    with tempfile.TemporaryDirectory(prefix="e", dir="/tmp") as folder:
        monkeypatch.setattr("experts.private_folder._FALLBACKS", (folder,))
        monkeypatch.setattr("tempfile.tempdir", folder)
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        yield


def test_no_other_user_may_enter_and_it_is_gone_afterwards() -> None:
    with ray_folder() as folder:
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        assert logs_of_this_process() == logs_of(folder)
        assert len(os.fsencode(folder / LONGEST_SOCKET)) <= MAX_SOCKET_PATH
    assert not folder.exists()
    assert logs_of_this_process() is None


def test_after_a_failure_its_logs_stay_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="Ray died"), ray_folder() as folder:
        raise RuntimeError("Ray died")
    assert folder.exists()
    assert str(logs_of(folder)) in caplog.text
    # The next one of this process begins again.
    with ray_folder() as again:
        assert again == folder
        assert not list(again.iterdir())


def test_of_killed_systems_the_last_three_stay() -> None:
    with ray_folder() as folder:
        base = folder.parent
        for number in range(5):
            left = base / f"ray-{2**30 + number}"
            left.mkdir()
            os.utime(left, (number, number))
    with ray_folder():
        left_behind = {path.name for path in base.glob(f"ray-{2**30 // 100}*")}
    assert left_behind == {f"ray-{2**30 + number}" for number in (2, 3, 4)}


def test_a_folder_with_too_long_a_name_is_left_for_a_short_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with ray_folder() as folder:
        assert len(os.fsencode(folder / LONGEST_SOCKET)) <= MAX_SOCKET_PATH


def test_a_user_id_of_ten_digits_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    monkeypatch.setattr("os.getuid", lambda: 4294967294)
    with ray_folder() as folder:
        assert len(os.fsencode(folder / LONGEST_SOCKET)) <= MAX_SOCKET_PATH
    folder.parent.rmdir()
