"""A cache on this machine for files of a remote registry, by digest and with a size limit.

Safe for several threads and processes: eviction holds a lock file, and a file is renamed to its path only when it is
complete and its digest is right. A file that is removed while it is mapped stays readable through the mapping.
"""

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from experts.bundles.manifest import FileEntry
from experts.errors import ExpertCapacityError, InvalidBundleError

logger = logging.getLogger(__name__)

_PIECE_BYTES = 4 * 1024 * 1024
# A file that was requested within this time may be about to be mapped.
_IN_USE_S = 120.0
# A download without a write for this long belongs to a process that has ended.
_ABANDONED_S = 3600.0
_LOCK_NAME = ".lock"
_PARTIAL_SUFFIX = ".partial"


class FileCache:
    """One folder of files."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """
        Args:
            directory: the folder; processes of one user may share it.
            max_bytes: the limit for all files, including running downloads. The least recently used are evicted first.
        """
        self.directory = directory
        self.max_bytes = max_bytes

    def locate(self, entry: FileEntry) -> Path | None:
        """The path of a cached file, which is not evicted for a while; None if it is not cached."""
        path = self._path(entry)
        if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.size:
            return None
        with suppress(FileNotFoundError):
            os.utime(path)
            return path
        return None

    def add(self, entry: FileEntry, open_source: Callable[[], BinaryIO]) -> Path:
        """Fetches a file and checks it.

        Args:
            entry: the file's entry in its manifest.
            open_source: opens the original.

        Raises:
            InvalidBundleError: it does not match the entry.
            ExpertCapacityError: it does not fit within the limit; nothing was fetched.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        target = self._path(entry)
        partial = target.with_name(f".{target.name}.{os.urandom(8).hex()}{_PARTIAL_SUFFIX}")
        try:
            with self._locked():
                self._make_room(entry)
                # Allocated at full size before it is written, so that other processes count it.
                with partial.open("xb") as file:
                    file.truncate(entry.size)
            with open_source() as reader, partial.open("r+b") as writer:
                copy_checked(reader, writer, entry)
            # A program that opens it to write has mistaken it for a copy.
            partial.chmod(0o444)
            # Under the lock, so that a listing has it under one of the two names.
            with self._locked():
                partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return target

    def remove(self, entry: FileEntry) -> bool:
        """Removes a damaged file. Returns whether it was cached."""
        try:
            self._path(entry).unlink()
        except FileNotFoundError:
            return False
        logger.warning("the copy of %s in %s is damaged and was removed", entry.path, self.directory)
        return True

    def _path(self, entry: FileEntry) -> Path:
        return self.directory / f"{entry.sha256}.safetensors"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.directory / _LOCK_NAME).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, entry: FileEntry) -> None:
        now = time.time()
        held = 0
        removable: list[tuple[float, int, Path]] = []
        for path in self.directory.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                age = now - status.st_mtime
                if path.name.endswith(_PARTIAL_SUFFIX) and age > _ABANDONED_S:
                    path.unlink()
                    continue
                held += status.st_size
                if path.suffix == ".safetensors" and age > _IN_USE_S:
                    removable.append((status.st_mtime, status.st_size, path))
        for _, size, path in sorted(removable):
            if held + entry.size <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            held -= size
        if held + entry.size > self.max_bytes:
            raise ExpertCapacityError(
                f"fetching {entry.path} ({entry.size} bytes) would take the files kept in {self.directory} to "
                f"{held + entry.size} bytes, above the limit registry_cache_bytes = {self.max_bytes}, and those used "
                f"within {_IN_USE_S:.0f} s stay: raise the limit"
            )


def copy_checked(reader: BinaryIO, writer: BinaryIO, entry: FileEntry) -> None:
    """Copies a file of a bundle.

    Raises:
        InvalidBundleError: it is not what the entry says.
    """
    digest = hashlib.sha256()
    copied = 0
    while piece := reader.read(_PIECE_BYTES):
        copied += len(piece)
        digest.update(piece)
        if copied > entry.size:
            # The digest will not match; the room that was taken is all there is.
            break
        writer.write(piece)
    if (found := digest.hexdigest()) != entry.sha256:
        raise InvalidBundleError(f"{entry.path}: is damaged, its SHA-256 is {found}, the manifest says {entry.sha256}")
