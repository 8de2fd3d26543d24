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
        """Args are the registry's root; it need not exist."""
        self._root = root

    def add_file(self, source: Path, entry: FileEntry, *, link: bool) -> None:
        """Makes a file part of the registry, if it is not already.

        Raises:
            InvalidBundleError: the source is not what the entry says.
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
        """Where a file lies; it is used in place.

        Raises:
            InvalidBundleError: it is missing or has another size.
        """
        path = self._root / _file_path(entry)
        verify_file(path, entry, digest=False)
        return path

    def create(self, path: str, content: bytes) -> bool:
        """Writes a new file; false if there is one already."""
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_name(target)
        try:
            with full_disk_named(target.parent), partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            try:
                # A link, unlike a rename, never replaces what another push has just written.
                os.link(partial, target)
            except FileExistsError:
                return False
            return True
        finally:
            partial.unlink(missing_ok=True)

    def replace(self, path: str, content: bytes) -> None:
        """Writes a file, in place of an earlier one; readers see the one or the other."""
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with _appearing(target) as partial, partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def read(self, path: str) -> bytes | None:
        """A file's content, at most one byte more than a manifest may have; none if there is no such file."""
        try:
            with (self._root / path).open("rb") as file:
                return file.read(MAX_MANIFEST_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None

    @property
    def exists(self) -> bool:
        """Whether there is such a folder."""
        return self._root.exists()

    def versions(self) -> list[tuple[str, str]]:
        """The organs and versions that have a folder, whether complete or not.

        Raises:
            RegistryError: it is no folder.
            PermissionError: a folder may not be read; `Path.glob` would say that there is nothing.
        """
        if self._root.exists() and not self._root.is_dir():
            raise RegistryError(f"the registry {self._root} is no folder; name one, or a URL like s3://bucket/experts")
        organs = _subfolders(self._root / "bundles")
        return [(organ.name, version.name) for organ in organs for version in _subfolders(organ)]


class RemoteStore:
    """An object store, or whatever else fsspec reaches. Files that are used are kept in a folder of this machine."""

    def __init__(self, filesystem: AbstractFileSystem, root: PurePosixPath, cache: FileCache) -> None:
        """Args are the file system, the registry's root on it, and where fetched files are kept."""
        self._filesystem = filesystem
        self._root = root
        self._cache = cache

    def add_file(self, source: Path, entry: FileEntry, *, link: bool) -> None:
        """Makes a file part of the registry, if it is not already; `link` has no meaning here.

        Raises:
            InvalidBundleError: the source is not what the entry says.
        """
        del link
        verify_file(source, entry)
        target = str(self._root / _file_path(entry))
        with self._reaching():
            self._filesystem.invalidate_cache()
            # Another size is what a push that died left, on file systems where uploads are not atomic.
            if self._filesystem.exists(target) and self._filesystem.size(target) == entry.size:
                return
            self._filesystem.makedirs(str(self._root / "files"), exist_ok=True)
            self._filesystem.put_file(str(source), target)

    def locate_file(self, entry: FileEntry) -> Path:
        """Where a file lies on this machine, after fetching it if need be.

        Raises:
            InvalidBundleError: it is missing, or not what the entry says.
            ExpertCapacityError: this machine has no room for it.
        """
        return self._cache.locate(entry) or self._fetch(entry)

    def fetch_again(self, entry: FileEntry) -> Path | None:
        """Puts a new copy in the place of one on this machine that was found damaged; none if there was no copy.

        Raises:
            InvalidBundleError: the file is missing in the registry, or not what the entry says there either.
            ExpertCapacityError: this machine has no room for it.
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
        """Writes a new file; false if there is one already."""
        target = str(self._root / path)
        with self._reaching():
            self._filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            try:
                self._filesystem.pipe_file(target, content, mode="create")
            except FileExistsError:
                return False
        return True

    def replace(self, path: str, content: bytes) -> None:
        """Writes a file, in place of an earlier one; readers see the one or the other where uploads are atomic."""
        target = str(self._root / path)
        with self._reaching():
            self._filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._filesystem.pipe_file(target, content)

    def read(self, path: str) -> bytes | None:
        """A file's content, at most one byte more than a manifest may have; none if there is no such file."""
        with self._reaching():
            try:
                content: bytes = self._filesystem.cat_file(str(self._root / path), end=MAX_MANIFEST_BYTES + 1)
            except FileNotFoundError:
                return None
        return content

    def versions(self) -> list[tuple[str, str]]:
        """The organs and versions that have a manifest."""
        with self._reaching():
            self._filesystem.invalidate_cache()
            paths = self._filesystem.glob(str(self._root / "bundles" / "*" / "*" / "manifest.json"))
        return [(PurePosixPath(path).parts[-3], PurePosixPath(path).parts[-2]) for path in paths]

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turns whatever a file system's own library raises into an OSError that names the registry."""
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
        # A program that opens a registry's file to write has mistaken it for a copy.
        partial.chmod(0o444)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        # Another file system, or one without hard links: the caller copies.
        return False
    return True
