"""Copies of bundles on this machine's own disk, so that they can be loaded again while the registry is away.

    <digest>/manifest.json    written first
    <digest>/<file>           those of the manifest's files that were needed here
    <digest>/model.sig        the signature, if the bundle has one

A file gets its name when it is complete and its SHA-256 is that of the manifest; a copy that is found damaged later is
fetched again, or refused. Several threads and processes may share a folder. Only its user can read it.
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
from experts.errors import InvalidBundleError, RegistryAwayError, SignatureError, UnknownBundleError
from experts.registry.file_cache import copy_checked
from experts.registry.registry import reading_registry

logger = logging.getLogger(__name__)

# The stable version, a candidate, and the version before.
KEPT_PER_ORGAN = 3


class BundleSource(Protocol):
    """What copies are made of: a `Registry`."""

    root: str

    def open(self, digest: str) -> Bundle:
        """The bundle with a digest; raises what `Registry.open` raises."""

    def manifest(self, digest: str) -> Manifest:
        """Its manifest; raises what `Registry.manifest` raises."""


class KeptBundles:
    """A folder of copies beside a registry. What is kept here is read here; the registry is asked for the rest."""

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
            registry: where bundles come from.
            directory: the folder of copies.
            admit: raises `SignatureError` where a bundle's signature is not accepted; for a copy the signature is then
                read again from the registry.
            in_use: the digests whose copies must stay.
        """
        self.directory = directory
        self._registry = registry
        self._admit = admit
        self._in_use = in_use

    def open(self, digest: str) -> Bundle:
        """The whole bundle, from its copy; without one, a copy is made first. `Bundle.verify` compares all digests.

        Where the disk has no room for a copy, it is the registry's own bundle.

        Raises:
            UnknownBundleError: there is no copy, and the registry has no such bundle.
            InvalidBundleError: there is no sound copy, and the registry's bundle is damaged.
            SignatureError: its signature is not accepted.
            RegistryAwayError: there is no copy, and the registry cannot be read.
        """
        return self._open(digest, lambda entry: True)

    def open_gates(self, digest: str) -> Bundle:
        """What a router needs of a bundle, checked: its gate rows and its prototype. Raises what `open` raises."""
        bundle = self._open(digest, lambda entry: entry.path in (GATE_FILE, PROTOTYPE_FILE))
        bundle.verify_files()
        return bundle

    def manifest(self, digest: str) -> Manifest:
        """A bundle's manifest, which is kept from then on.

        Raises:
            UnknownBundleError: neither the copies nor the registry have it.
            RegistryAwayError: it is not kept, and the registry cannot be read.
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
        """What `open` opens, without making a copy. Raises what `open` raises."""
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
            # It may have been signed again since it was copied; if not, the copy's refusal says what is wrong.
            try:
                source = self._from_registry(bundle.digest)
            except (RegistryAwayError, UnknownBundleError, InvalidBundleError):
                return bundle
            if source.signature is None or source.manifest_bytes != bundle.manifest_bytes:
                return bundle
            self._write(bundle.digest, SIGNATURE_NAME, source.signature)
            bundle.signature = source.signature
        return bundle

    def _fetch_again(self, digest: str, entry: FileEntry) -> Path:
        """Puts a new copy in the place of a damaged one.

        Raises:
            InvalidBundleError: the registry has no sound file either.
        """
        path = self.directory / digest / entry.path
        logger.warning("the copy of %s in %s is damaged and is fetched again", entry.path, path.parent)
        path.unlink(missing_ok=True)
        try:
            source = self._from_registry(digest)
        except (RegistryAwayError, UnknownBundleError) as error:
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
        """A file that gets its name when the block ends well."""
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
        """Removes the copies of an organ that were not opened for longest, so that with the next one few remain."""
        found: list[tuple[float, Path]] = []
        with suppress(FileNotFoundError):
            for folder in self.directory.iterdir():
                # A manifest alone is small, and names the version of what was served once.
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
            "no copy of bundle %s… is kept in %s (%s): it cannot be loaded again while the registry is away",
            digest[:12],
            self.directory,
            error.strerror or type(error).__name__,
        )


def _chosen(manifest: Manifest, wanted: Callable[[FileEntry], bool]) -> list[FileEntry]:
    entries = [entry for entry in manifest.files if wanted(entry)]
    # A bundle whose gate lies in another file is kept as a whole.
    return entries if any(entry.path == GATE_FILE for entry in entries) else list(manifest.files)
