import os
import stat
from pathlib import Path

import pytest

from experts import private_folder as module
from experts.private_folder import is_private, private_folder, runtime_folder, user_folder

NAME = f"echoray-{os.getuid()}"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_all_processes_of_a_user_find_the_same_folder_that_no_other_may_enter(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    folder = private_folder(str(tmp_path))
    assert folder == private_folder(str(tmp_path)) == tmp_path / NAME
    assert mode(folder) == 0o700


def test_one_that_was_opened_to_others_is_closed_again(tmp_path: Path) -> None:
    private_folder(str(tmp_path)).chmod(0o777)
    assert mode(private_folder(str(tmp_path))) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_a_name_that_another_user_took_does_not_prevent_a_start(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / f"{NAME}-1").touch()
    for taken in tmp_path.iterdir():
        os.chown(taken, 65534, 65534)
    (tmp_path / f"{NAME}-2").symlink_to("/etc")
    folder = private_folder(str(tmp_path))
    assert folder == tmp_path / f"{NAME}-3"
    # Also after the other one's are gone.
    (tmp_path / NAME).rmdir()
    assert private_folder(str(tmp_path)) == folder


def test_a_link_to_a_folder_of_ours_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / NAME).symlink_to(tmp_path / "other")
    assert private_folder(str(tmp_path)) == tmp_path / f"{NAME}-1"
    assert not is_private(tmp_path / NAME)


def test_a_long_base_is_left_for_one_whose_sockets_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    short = tmp_path / "s"
    short.mkdir()
    monkeypatch.setattr(module, "_FALLBACKS", (str(short),))
    limit = len(str(short)) + 30
    assert private_folder(str(long), longest=limit) == short / NAME


def test_a_runtime_folder_of_the_user_before_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "absent"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert runtime_folder() == tmp_path / NAME


def test_where_nothing_can_be_made_the_text_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FALLBACKS", ())
    with pytest.raises(ValueError, match=r"no folder of yours can be made in .*set TMPDIR"):
        private_folder(str(tmp_path / "absent"))


class TestUserFolder:
    def test_the_variable_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert user_folder("XDG_CACHE_HOME", ".cache") == tmp_path

    def test_it_is_in_the_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert user_folder("XDG_CACHE_HOME", ".cache") == tmp_path / ".cache"

    def test_a_user_without_a_home_has_one_all_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        assert user_folder("XDG_CACHE_HOME", ".cache") == tmp_path / NAME / ".cache"

    def test_and_so_has_one_whose_home_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", "/proc")
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "/proc")
        assert user_folder("XDG_CACHE_HOME", ".cache") == tmp_path / NAME / ".cache"
