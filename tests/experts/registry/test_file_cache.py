import hashlib
import io
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest

from experts.bundles.manifest import FileEntry
from experts.errors import ExpertCapacityError, InvalidBundleError
from experts.registry.file_cache import FileCache


def content_of(number: int, size: int = 1000) -> bytes:
    return bytes([number]) * size


def entry_of(content: bytes) -> FileEntry:
    return FileEntry(path="experts.safetensors", sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def source(content: bytes) -> Callable[[], BinaryIO]:
    return lambda: io.BytesIO(content)


def age(cache: FileCache, content: bytes, seconds: float) -> None:
    path = cache.locate(entry_of(content))
    assert path is not None
    os.utime(path, (time.time() - seconds,) * 2)


def files(cache: FileCache) -> set[str]:
    return {path.stem for path in cache.directory.glob("*.safetensors")}


def test_what_is_added_is_found(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 10_000)
    entry = entry_of(content_of(1))
    assert cache.locate(entry) is None
    path = cache.add(entry, source(content_of(1)))
    assert cache.locate(entry) == path
    assert path.read_bytes() == content_of(1)
    assert path.stat().st_mode & 0o222 == 0


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 3000)
    for number in (1, 2, 3):
        cache.add(entry_of(content_of(number)), source(content_of(number)))
        age(cache, content_of(number), 1000 * number)
    # Asked for again: 3 is now the youngest, 2 the oldest.
    assert cache.locate(entry_of(content_of(3))) is not None
    cache.add(entry_of(content_of(4)), source(content_of(4)))
    assert files(cache) == {entry_of(content_of(number)).sha256 for number in (1, 3, 4)}


def test_what_is_in_use_stays_and_the_limit_holds(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 2500)
    for number in (1, 2):
        cache.add(entry_of(content_of(number)), source(content_of(number)))
    with pytest.raises(ExpertCapacityError, match="above the limit registry_cache_bytes = 2500"):
        cache.add(entry_of(content_of(3)), source(content_of(3)))
    with pytest.raises(ExpertCapacityError, match="above the limit"):
        cache.add(entry_of(content_of(4, 3000)), source(content_of(4, 3000)))
    assert files(cache) == {entry_of(content_of(number)).sha256 for number in (1, 2)}
    assert not list(cache.directory.glob("*.partial"))


def test_a_file_under_way_counts_in_full(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 1500)
    opened, go_on = threading.Event(), threading.Event()

    def slow() -> BinaryIO:
        opened.set()
        assert go_on.wait(10)
        return io.BytesIO(content_of(1))

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.add, entry_of(content_of(1)), slow)
        assert opened.wait(10)
        with pytest.raises(ExpertCapacityError):
            cache.add(entry_of(content_of(2)), source(content_of(2)))
        go_on.set()
        assert first.result().read_bytes() == content_of(1)


@pytest.mark.parametrize("found", [content_of(2), content_of(1, 999), content_of(1, 1001), b""])
def test_what_is_not_what_it_should_be_is_not_kept(found: bytes, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 10_000)
    with pytest.raises(InvalidBundleError, match=r"experts.safetensors: is damaged"):
        cache.add(entry_of(content_of(1)), source(found))
    assert list(cache.directory.glob("*.safetensors")) == list(cache.directory.glob(".*.partial")) == []


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 1500)
    cache.directory.mkdir()
    abandoned, recent = cache.directory / ".a.partial", cache.directory / ".b.partial"
    for path in (abandoned, recent):
        path.write_bytes(bytes(400))
    os.utime(abandoned, (time.time() - 10_000,) * 2)
    cache.add(entry_of(content_of(1)), source(content_of(1)))
    assert not abandoned.exists()
    assert recent.exists()


def test_many_at_once_keep_the_limit(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 5000)
    numbers = [number % 12 for number in range(120)]

    def fetch(number: int) -> bool:
        try:
            path = cache.locate(entry_of(content_of(number))) or cache.add(
                entry_of(content_of(number)), source(content_of(number))
            )
        except ExpertCapacityError:
            return False
        assert path.read_bytes() == content_of(number)
        return True

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(fetch, numbers))
    assert any(done)
    assert sum(path.stat().st_size for path in cache.directory.iterdir()) <= 5000
