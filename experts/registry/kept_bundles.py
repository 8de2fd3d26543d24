"""Local copies of the bundles in use, so that they can be loaded while the registry is unavailable.

    <digest>/manifest.json    written first
    <digest>/<file>           the manifest's files that were needed here
    <digest>/model.sig        the signature, if the bundle has one

A file is renamed to its path when it is complete and its SHA-256 matches the manifest. A damaged copy is fetched again,
or refused. Several threads and processes may share a folder. Only its user can read it.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from experts.bundles.bundle import SIGNATURE_NAME, Bundle, verify_file
from experts.bundles.layout import GATE_FILE, PROTOTYPE_FILE
from experts.bundles.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileEntry, Manifest
from experts.errors import InvalidBundleError, RegistryUnavailableError, SignatureError, UnknownBundleError
from experts.registry.file_cache import copy_checked
from experts.registry.registry import reading_registry

logger = logging.getLogger(__name__)

# The stable version, a candidate, and the previous version.
KEPT_PER_ORGAN = 3


class BundleSource(Protocol):
    """The source of the copies: a `Registry`."""

    root: str

    def open(self, digest: str) -> Bundle:
        """Opens the bundle with a digest. Raises the errors of `Registry.open`."""

    def manifest(self, digest: str) -> Manifest:
        """Reads a bundle's manifest. Raises the errors of `Registry.manifest`."""


class KeptBundles:
    """A folder of local copies, which are preferred over the registry."""

    def __init__(
        self,
        registry: BundleSource,
        directory: Path,
        *,
        admit: Callable[[Bundle], None] = lambda bundle: None,
        in_use: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """
        Args:
            registry: the source of bundles.
            directory: the folder of copies.
            admit: raises `SignatureError` if a bundle's signature is not accepted; for a copy the signature is then
                read again from the registry.
            in_use: returns the digests whose copies must stay.
        """
        self.directory = directory
        self._registry = registry
        self._admit = admit
        self._in_use = in_use

    def open(self, digest: str) -> Bundle:
        """Opens a bundle from its copy, which is made first if it is missing. `Bundle.verify` compares all digests.

        If the disk is full, the bundle is opened in the registry.

        Raises:
            UnknownBundleError: there is no copy, and the registry has no such bundle.
            InvalidBundleError: there is no valid copy, and the registry's bundle is damaged.
            SignatureError: its signature is not accepted.
            RegistryUnavailableError: there is no copy, and the registry is unavailable.
        """
        return self._open(digest, lambda entry: True)

    def open_gates(self, digest: str) -> Bundle:
        """Opens and checks the parts of a bundle for a router: gate rows and prototype. Raises the errors of `open`."""
        bundle = self._open(digest, lambda entry: entry.path in (GATE_FILE, PROTOTYPE_FILE))
        bundle.verify_files()
        return bundle

    def manifest(self, digest: str) -> Manifest:
        """A bundle's manifest, of which a copy is kept.

        Raises:
            UnknownBundleError: neither the copies nor the registry have it.
            RegistryUnavailableError: there is no copy, and the registry is unavailable.
        """
        kept = self._kept_manifest(digest)
        if kept is not None:
            return kept[0]
        with reading_registry(self._registry.root):
            manifest = self._registry.manifest(digest)
        try:
            self._write(digest, MANIFEST_NAME, manifest.to_json())
        except OSError as error:
            self._warn(digest, error)
        return manifest

    def look(self, digest: str) -> Bundle:
        """Like `open`, but makes no copy."""
        kept = self._kept_manifest(digest)
        if kept is not None and not self._missing(kept[0].files, digest):
            return self._admitted(self._copy_of(kept, kept[0].files))
        return self._from_registry(digest)

    def _open(self, digest: str, wanted: Callable[[FileEntry], bool]) -> Bundle:
        kept = self._kept_manifest(digest)
        if kept is not None:
            entries = _chosen(kept[0], wanted)
            if not self._missing(entries, digest):
                with suppress(FileNotFoundError):
                    os.utime(self.directory / digest)
                return self._admitted(self._copy_of(kept, entries))
        source = self._from_registry(digest)
        entries = _chosen(source.manifest, wanted)
        try:
            self._keep(source, entries)
        except OSError as error:
            self._warn(digest, error)
            return source
        return self._copy_of((source.manifest, source.manifest_bytes), entries)

    def _copy_of(self, kept: tuple[Manifest, bytes], entries: Collection[FileEntry]) -> Bundle:
        manifest, content = kept
        folder = self.directory / manifest.digest
        signature = None
        with suppress(FileNotFoundError):
            signature = (folder / SIGNATURE_NAME).read_bytes()
        return Bundle(
            manifest,
            {entry.path: folder / entry.path for entry in entries},
            manifest_bytes=content,
            signature=signature,
            fetch_again=lambda entry: self._fetch_again(manifest.digest, entry),
        )

    def _admitted(self, bundle: Bundle) -> Bundle:
        try:
            self._admit(bundle)
        except SignatureError:
            # It may have been signed again since it was copied; if not, the first error is raised.
            try:
                source = self._from_registry(bundle.digest)
            except (RegistryUnavailableError, UnknownBundleError, InvalidBundleError):
                return bundle
            if source.signature is None or source.manifest_bytes != bundle.manifest_bytes:
                return bundle
            self._write(bundle.digest, SIGNATURE_NAME, source.signature)
            bundle.signature = source.signature
        return bundle

    def _fetch_again(self, digest: str, entry: FileEntry) -> Path:
        """Replaces a damaged copy.

        Raises:
            InvalidBundleError: the registry's file is damaged too.
        """
        path = self.directory / digest / entry.path
        logger.warning("the copy of %s in %s is damaged and is fetched again", entry.path, path.parent)
        path.unlink(missing_ok=True)
        try:
            source = self._from_registry(digest)
        except (RegistryUnavailableError, UnknownBundleError) as error:
            raise InvalidBundleError(f"{entry.path}: its copy in {path.parent} is damaged, and {error}") from error
        self._keep(source, [entry])
        return path

    def _from_registry(self, digest: str) -> Bundle:
        with reading_registry(self._registry.root):
            return self._registry.open(digest)

    def _kept_manifest(self, digest: str) -> tuple[Manifest, bytes] | None:
        path = self.directory / digest / MANIFEST_NAME
        try:
            with path.open("rb") as file:
                content = file.read(MAX_MANIFEST_BYTES + 1)
            manifest = Manifest.from_json(content, str(path))
        except FileNotFoundError:
            return None
        except (OSError, InvalidBundleError) as error:
            logger.warning("the copy of a manifest is passed over: %s", error)
            return None
        if manifest.digest != digest:
            logger.warning("the copy of a manifest is passed over: %s is another bundle's", path)
            return None
        return manifest, content

    def _missing(self, entries: Iterable[FileEntry], digest: str) -> list[FileEntry]:
        missing = []
        for entry in entries:
            try:
                verify_file(self.directory / digest / entry.path, entry, digest=False)
            except InvalidBundleError:
                missing.append(entry)
        return missing

    def _keep(self, source: Bundle, entries: Collection[FileEntry]) -> None:
        digest = source.digest
        if digest not in self._in_use():
            self._prune(source.manifest.organ, digest)
        self._write(digest, MANIFEST_NAME, source.manifest_bytes)
        if source.signature is not None:
            self._write(digest, SIGNATURE_NAME, source.signature)
        for entry in self._missing(entries, digest):
            with source.locations[entry.path].open("rb") as reader, self._appearing(digest, entry.path) as writer:
                copy_checked(reader, writer, entry)

    def _write(self, digest: str, name: str, content: bytes) -> None:
        with self._appearing(digest, name) as writer:
            writer.write(content)

    @contextmanager
    def _appearing(self, digest: str, name: str) -> Iterator[BinaryIO]:
        """A temporary file, which is renamed at the end of the block."""
        folder = self.directory / digest
        for each in (self.directory, folder):
            each.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, partial = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".partial")
        try:
            with os.fdopen(descriptor, "wb") as writer:
                yield writer
                writer.flush()
                os.fsync(writer.fileno())
            os.replace(partial, folder / name)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(partial)
            raise

    def _prune(self, organ: str, coming: str) -> None:
        """Removes the least recently opened copies of an organ, before another one is added."""
        found: list[tuple[float, Path]] = []
        with suppress(FileNotFoundError):
            for folder in self.directory.iterdir():
                # A manifest without files is small, and has the version of a bundle that was served before.
                kept = self._kept_manifest(folder.name) if any(folder.glob("*.safetensors")) else None
                if kept is not None and kept[0].organ == organ and folder.name != coming:
                    with suppress(FileNotFoundError):
                        found.append((folder.stat().st_mtime, folder))
        used = set(self._in_use())
        removable = [folder for _, folder in sorted(found) if folder.name not in used]
        for folder in removable[: max(0, len(found) + 1 - KEPT_PER_ORGAN)]:
            shutil.rmtree(folder, ignore_errors=True)

    def _warn(self, digest: str, error: OSError) -> None:
        logger.warning(
            "no copy of bundle %s… is kept in %s (%s): it cannot be loaded while the registry is unavailable",
            digest[:12],
            self.directory,
            error.strerror or type(error).__name__,
        )


def _chosen(manifest: Manifest, wanted: Callable[[FileEntry], bool]) -> list[FileEntry]:
    entries = [entry for entry in manifest.files if wanted(entry)]
    # A bundle with its gate rows in another file is copied completely.
    return entries if any(entry.path == GATE_FILE for entry in entries) else list(manifest.files)
