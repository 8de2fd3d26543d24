"""On a disk that is really full: Linux's /dev/full takes no byte."""

import errno
from pathlib import Path

import pytest

from experts.full_disk import full_disk_named


def test_the_folder_is_named_and_other_errors_stay(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="No space left on device") as caught,
        full_disk_named(tmp_path),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert caught.value.strerror == "No space left on device: make room there"
    with pytest.raises(FileNotFoundError) as other, full_disk_named(tmp_path):
        (tmp_path / "none").read_bytes()
    assert other.value.filename == str(tmp_path / "none")
