"""Where bundles are kept: by organ and version, under any root that fsspec can reach.

    files/<sha256>.safetensors              every file once, however many bundles have it
    bundles/<organ>/<version>/manifest.json  written last: a bundle without it does not exist

Nothing is ever changed in place. A push that dies half-way leaves files that no manifest names and no reader sees.
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from experts.bundle import Bundle
from experts.errors import InvalidBundleError, UnknownBundleError
from experts.manifest import MANIFEST_NAME, Manifest, check_organ, check_version, version_key
from experts.registry_store import LocalStore, RemoteStore


class Registry:
    """One registry. Safe to use from several threads and processes at once."""

    def __init__(self, root: str | Path, *, cache_directory: Path | None = None) -> None:
        """Opens a registry; a root that does not exist yet is an empty one.

        Args:
            root: a folder, or a URL that fsspec knows, for example "s3://bucket/experts".
            cache_directory: where files of a remote root are kept once fetched; by default `echovlm-ray/files` in the
                user's cache folder. Local roots are read in place.
        """
        self.root = str(root)
        filesystem, path = url_to_fs(self.root)
        self._store: LocalStore | RemoteStore
        if isinstance(filesystem, LocalFileSystem):
            self._store = LocalStore(Path(path))
        else:
            self._store = RemoteStore(filesystem, PurePosixPath(path), cache_directory or _user_cache())
        # Where a digest was last seen; only a hint, the manifest there is read again each time.
        self._seen: dict[str, tuple[str, str]] = {}

    def push(self, bundle_directory: Path, *, link: bool = False) -> Manifest:
        """Adds the bundle in a folder, after checking all of it. Pushing it again changes nothing.

        Args:
            bundle_directory: the bundle's folder.
            link: hard-link the files into a local root instead of copying them. For a folder that nobody will write
                to again: its files then are the registry's files.

        Returns:
            Its manifest.

        Raises:
            InvalidBundleError: the bundle is not what its manifest says, or the registry has another bundle of this
                organ and version: versions are immutable.
        """
        bundle = Bundle.open(bundle_directory)
        # The store checks the digests: each file is read once.
        bundle.verify(digests=False)
        manifest = bundle.manifest
        self._refuse_other(manifest)
        for entry in manifest.files:
            self._store.add_file(bundle.locations[entry.path], entry, link=link)
        if not self._store.create(self._manifest_path(manifest.organ, manifest.version), manifest.to_json()):
            # Somebody else was faster.
            self._refuse_other(manifest)
        return manifest

    def open(self, digest: str) -> Bundle:
        """The bundle with a digest. Files of a remote root are fetched first, and checked.

        Raises:
            UnknownBundleError: the registry has no such bundle.
            InvalidBundleError: a file is missing or damaged.
        """
        manifest = self._by_digest(digest)
        return Bundle(manifest, {entry.path: self._store.locate_file(entry) for entry in manifest.files})

    def find(self, organ: str, version: str) -> Manifest:
        """The manifest of an organ's version.

        Raises:
            UnknownBundleError: there is none; the text names the versions that there are.
        """
        manifest = self._read(organ, version) if _is_valid(organ, version) else None
        if manifest is None:
            versions = ", ".join(known.version for known in self.list(organ)) or "none"
            raise UnknownBundleError(
                f"the registry {self.root} has no version {version!r} of organ {organ!r}; it has {versions}"
            )
        return manifest

    def list(self, organ: str | None = None) -> list[Manifest]:
        """All bundles, or an organ's, by organ and then from the oldest version to the newest.

        Raises:
            InvalidBundleError: a manifest is damaged.
        """
        found = [self._read(known_organ, version) for known_organ, version in self._versions(organ)]
        manifests = [manifest for manifest in found if manifest is not None]
        return sorted(manifests, key=lambda manifest: (manifest.organ, version_key(manifest.version)))

    def _by_digest(self, digest: str) -> Manifest:
        candidates = [self._seen[digest]] if digest in self._seen else []
        for organ, version in itertools.chain(candidates, self._versions(None)):
            # One damaged manifest must not hide the others.
            with suppress(InvalidBundleError):
                manifest = self._read(organ, version)
                if manifest is not None and manifest.digest == digest:
                    return manifest
        raise UnknownBundleError(
            f"the registry {self.root} has no bundle with the digest {digest[:100]!r}; push it there first"
        )

    def _versions(self, organ: str | None) -> Iterator[tuple[str, str]]:
        for known_organ, version in self._store.versions():
            if organ in (None, known_organ) and _is_valid(known_organ, version):
                yield known_organ, version

    def _read(self, organ: str, version: str) -> Manifest | None:
        path = self._manifest_path(organ, version)
        content = self._store.read(path)
        if content is None:
            return None
        manifest = Manifest.from_json(content, f"{self.root}/{path}")
        if (manifest.organ, manifest.version) != (organ, version):
            raise InvalidBundleError(
                f"{self.root}/{path}: says it is {manifest.organ} {manifest.version}; the registry was changed by hand"
            )
        self._seen[manifest.digest] = (organ, version)
        return manifest

    def _refuse_other(self, manifest: Manifest) -> None:
        existing = self._read(manifest.organ, manifest.version)
        if existing is not None and existing.digest != manifest.digest:
            raise InvalidBundleError(
                f"the registry {self.root} has another bundle of {manifest.organ} {manifest.version} "
                f"({existing.digest[:12]}…, not {manifest.digest[:12]}…); versions are immutable, raise the version"
            )

    def _manifest_path(self, organ: str, version: str) -> str:
        return f"bundles/{organ}/{version}/{MANIFEST_NAME}"


def _is_valid(organ: str, version: str) -> bool:
    try:
        return bool(check_organ(organ) and check_version(version))
    except ValueError:
        return False


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "echovlm-ray" / "files"
