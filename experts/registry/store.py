"""Stores a registry's files on a disk or an object store; each becomes visible only when complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from fsspec import AbstractFileSystem

from experts.bundles.bundle import verify_file
from experts.bundles.manifest import MAX_MANIFEST_BYTES, FileEntry
from experts.errors import ExpertCapacityError, InvalidBundleError, RegistryError
from experts.full_disk import full_disk_named
from experts.registry.file_cache import FileCache, copy_checked


class LocalStore:
    """A folder."""

    def __init__(self, root: Path) -> None:
        """`root` is the registry's root, which need not exist."""
        self._root = root

    def add_file(self, source: Path, entry: FileEntry, *, link: bool) -> None:
        """Adds a file to the registry if it is missing.

        Raises:
            InvalidBundleError: the source does not match the entry.
        """
        target = self._root / _file_path(entry)
        if _has_size(target, entry.size):
            verify_file(source, entry)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with _appearing(target) as partial:
            if link and _link(source, partial):
                verify_file(partial, entry)
                return
            with source.open("rb") as reader, partial.open("xb") as writer:
                copy_checked(reader, writer, entry)
                writer.flush()
                os.fsync(writer.fileno())

    def locate_file(self, entry: FileEntry) -> Path:
        """The path of a file, which is read in place.

        Raises:
            InvalidBundleError: it is missing, or its size differs.
        """
        path = self._root / _file_path(entry)
        verify_file(path, entry, digest=False)
        return path

    def create(self, path: str, content: bytes) -> bool:
        """Writes a new file. Returns false if there is one already."""
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_name(target)
        try:
            with full_disk_named(target.parent), partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            try:
                # A link, unlike a rename, never replaces a file of a concurrent push.
                os.link(partial, target)
            except FileExistsError:
                return False
            return True
        finally:
            partial.unlink(missing_ok=True)

    def replace(self, path: str, content: bytes) -> None:
        """Writes or replaces a file atomically."""
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with _appearing(target) as partial, partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def read(self, path: str) -> bytes | None:
        """A file's content, up to one byte more than the limit of a manifest; None if it does not exist."""
        try:
            with (self._root / path).open("rb") as file:
                return file.read(MAX_MANIFEST_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None

    @property
    def exists(self) -> bool:
        """Whether the folder exists."""
        return self._root.exists()

    def versions(self) -> list[tuple[str, str]]:
        """The organs and versions with a folder, complete or not.

        Raises:
            RegistryError: it is not a folder.
            PermissionError: a folder is unreadable; `Path.glob` would return nothing.
        """
        if self._root.exists() and not self._root.is_dir():
            raise RegistryError(f"the registry {self._root} is no folder; name one, or a URL like s3://bucket/experts")
        organs = _subfolders(self._root / "bundles")
        return [(organ.name, version.name) for organ in organs for version in _subfolders(organ)]


class RemoteStore:
    """An object store or any other file system of fsspec. Files in use are cached on this machine."""

    def __init__(self, filesystem: AbstractFileSystem, root: PurePosixPath, cache: FileCache) -> None:
        """Takes the file system, the registry's root on it, and the cache for fetched files."""
        self._filesystem = filesystem
        self._root = root
        self._cache = cache

    def add_file(self, source: Path, entry: FileEntry, *, link: bool) -> None:
        """Adds a file to the registry if it is missing; `link` is ignored.

        Raises:
            InvalidBundleError: the source does not match the entry.
        """
        del link
        verify_file(source, entry)
        target = str(self._root / _file_path(entry))
        with self._reaching():
            self._filesystem.invalidate_cache()
            # On file systems without atomic uploads, an interrupted push leaves a file of another size.
            if self._filesystem.exists(target) and self._filesystem.size(target) == entry.size:
                return
            self._filesystem.makedirs(str(self._root / "files"), exist_ok=True)
            self._filesystem.put_file(str(source), target)

    def locate_file(self, entry: FileEntry) -> Path:
        """Fetches a file if needed and returns its local path.

        Raises:
            InvalidBundleError: it is missing, or does not match the entry.
            ExpertCapacityError: it does not fit in the cache.
        """
        return self._cache.locate(entry) or self._fetch(entry)

    def fetch_again(self, entry: FileEntry) -> Path | None:
        """Replaces a damaged file in the cache; None if it was not cached.

        Raises:
            InvalidBundleError: the file in the registry is missing or damaged, too.
            ExpertCapacityError: it does not fit in the cache.
        """
        return self._fetch(entry) if self._cache.remove(entry) else None

    def _fetch(self, entry: FileEntry) -> Path:
        def open_source() -> BinaryIO:
            try:
                source: BinaryIO = self._filesystem.open(str(self._root / _file_path(entry)), "rb")
            except FileNotFoundError as error:
                raise InvalidBundleError(f"{entry.path}: named by the manifest and missing in the registry") from error
            return source

        with self._reaching():
            return self._cache.add(entry, open_source)

    def create(self, path: str, content: bytes) -> bool:
        """Writes a new file. Returns false if there is one already."""
        target = str(self._root / path)
        with self._reaching():
            self._filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            try:
                self._filesystem.pipe_file(target, content, mode="create")
            except FileExistsError:
                return False
        return True

    def replace(self, path: str, content: bytes) -> None:
        """Writes or replaces a file, atomically if the file system's uploads are atomic."""
        target = str(self._root / path)
        with self._reaching():
            self._filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._filesystem.pipe_file(target, content)

    def read(self, path: str) -> bytes | None:
        """A file's content, up to one byte more than the limit of a manifest; None if it does not exist."""
        with self._reaching():
            try:
                content: bytes = self._filesystem.cat_file(str(self._root / path), end=MAX_MANIFEST_BYTES + 1)
            except FileNotFoundError:
                return None
        return content

    def versions(self) -> list[tuple[str, str]]:
        """The organs and versions with a manifest."""
        with self._reaching():
            self._filesystem.invalidate_cache()
            paths = self._filesystem.glob(str(self._root / "bundles" / "*" / "*" / "manifest.json"))
        return [(PurePosixPath(path).parts[-3], PurePosixPath(path).parts[-2]) for path in paths]

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Converts the exceptions of a file system's library into an OSError that names the registry."""
        try:
            yield
        except (OSError, InvalidBundleError, ExpertCapacityError):
            raise
        except Exception as error:
            raise ConnectionError(f"the registry {self._root} cannot be reached: {error}") from error


def _file_path(entry: FileEntry) -> str:
    return f"files/{entry.sha256}.safetensors"


def _subfolders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == size


def _partial_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.urandom(8).hex()}.partial")


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    partial = _partial_name(target)
    try:
        with full_disk_named(target.parent):
            yield partial
        # Read-only, against programs that open a registry's file to write.
        partial.chmod(0o444)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        # Another file system, or one without hard links: the caller makes a copy.
        return False
    return True
