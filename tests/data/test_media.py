"""Paths in records cannot leave the image root."""

import os
from pathlib import Path

import pytest

from echovlm_ray.data.media import ImageRoot, UnusableImageError
from tests.data.records import png


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    return folder


def test_a_file_below_the_root_is_read(root: Path) -> None:
    (root / "link.png").symlink_to(root / "sub" / "a.png")
    for path in ("sub/a.png", "./sub/a.png", "link.png"):
        assert ImageRoot(root).read(path, 10**6) == png()


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png",
        "sub/../../secret.png",
        "sub/../sub/a.png",
        "/etc/passwd",
        "C:/Windows/a.png",
        "\\\\server\\share\\a.png",
        "..\\secret.png",
        "out.png",
        "outside/secret.png",
    ],
)
def test_nothing_outside_is_read(path: str, root: Path) -> None:
    (root / "out.png").symlink_to(root.parent / "secret.png")
    (root / "outside").symlink_to(root.parent)
    with pytest.raises(UnusableImageError) as caught:
        ImageRoot(root).read(path, 10**6)
    assert caught.value.kind == "outside the root"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("", "not a path"),
        ("a\0b.png", "not a path"),
        ("a\nb.png", "not a path"),
        ("a" * 2000, "not a path"),
        ("a" * 500, "unreadable image"),
        ("http://example.org/a.png", "not a path"),
        ("data:image/png;base64,AAAA", "not a path"),
        ("none.png", "missing image"),
        ("sub/a.png/b.png", "unreadable image"),
        ("loop", "unreadable image"),
        ("sub", "unreadable image"),
        ("pipe", "unreadable image"),
    ],
)
def test_what_is_no_image_file_is_named(path: str, kind: str, root: Path) -> None:
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    with pytest.raises(UnusableImageError) as caught:
        ImageRoot(root).read(path, 10**6)
    assert caught.value.kind == kind
    assert not path or path not in str(caught.value)


def test_a_file_over_the_limit_is_not_read(root: Path) -> None:
    with pytest.raises(UnusableImageError, match="the limit is 10"):
        ImageRoot(root).read("sub/a.png", 10)


def test_a_root_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        ImageRoot(tmp_path / "none")
