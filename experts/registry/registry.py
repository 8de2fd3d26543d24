"""The registry of bundles: by organ and version, under any root that fsspec can reach.

    files/<sha256>.safetensors              every file once, for all bundles that have it
    bundles/<organ>/<version>/<digest>.sig   the signature of the bundle of this digest, if it is signed
    bundles/<organ>/<version>/manifest.json  written last: a bundle without it does not exist

Only signatures are ever replaced. An interrupted push leaves files that no manifest lists and no reader uses. The name
of a signature contains the digest, so that concurrent pushes of different bundles do not conflict.
"""

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from experts.bundles.bundle import MAX_SIGNATURE_BYTES, SIGNATURE_NAME, Bundle
from experts.bundles.manifest import MANIFEST_NAME, FileEntry, Manifest, check_organ, check_version, version_key
from experts.bundles.new_folder import new_bundle_folder
from experts.errors import (
    InvalidBundleError,
    RegistryError,
    RegistryUnavailableError,
    SignatureError,
    UnknownBundleError,
)
from experts.private_folder import user_folder
from experts.registry.file_cache import FileCache
from experts.registry.store import LocalStore, RemoteStore

DEFAULT_CACHE_BYTES = 64 * 1024**3


class Registry:
    """One registry. Safe for several threads and processes."""

    def __init__(
        self,
        root: str | Path,
        *,
        options: Mapping[str, str | int | bool] | None = None,
        cache_directory: Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        fallbacks: Sequence["Registry"] = (),
    ) -> None:
        """Opens a registry. A root that does not exist yet is an empty registry.

        Args:
            root: a folder, or a URL for fsspec, for example "s3://bucket/experts".
            options: options of fsspec's file system, for example `endpoint_url` for S3.
            cache_directory: the cache for files of a remote root; by default `echovlm-ray/files` in the user's cache
                folder. Local roots are read in place.
            cache_bytes: the limit of the cache.
            fallbacks: registries that are read, and never written, for bundles that this one does not have.

        Raises:
            RegistryError: fsspec does not support the URL, a package is missing, or an option is invalid.
        """
        self.root = str(root)
        try:
            filesystem, path = url_to_fs(self.root, **(options or {}))
        except (ImportError, TypeError, ValueError) as error:
            raise RegistryError(f"the registry {self.root} cannot be reached: {error}") from error
        self._fallbacks = tuple(fallbacks)
        self._store: LocalStore | RemoteStore
        if isinstance(filesystem, LocalFileSystem):
            self._store = LocalStore(Path(path))
        else:
            cache = FileCache(cache_directory or _user_cache(), cache_bytes)
            self._store = RemoteStore(filesystem, PurePosixPath(path), cache)
        # The last location of a digest. Only a hint: the manifest there is read again each time.
        self._seen: dict[str, tuple[str, str]] = {}

    def push(self, bundle_directory: Path, *, link: bool = False) -> Manifest:
        """Checks the bundle in a folder and adds it. Idempotent.

        A signature is added, too, and replaces an older one. It is not verified here, but when the bundle is loaded.

        Args:
            bundle_directory: the bundle's folder.
            link: hard-link the files into a local root instead of copying them. The folder must not be written to
                afterwards, because its files are then the registry's files.

        Returns:
            Its manifest.

        Raises:
            InvalidBundleError: the bundle does not match its manifest, or the registry has another bundle of this organ
                and version: versions are immutable.
            SignatureError: the signature covers another serialisation of the manifest than the registry's.
        """
        bundle = Bundle.open(bundle_directory)
        # The store checks the digests, so that each file is read once.
        bundle.verify(digests=False)
        manifest = bundle.manifest
        self._refuse_other(bundle)
        for entry in manifest.files:
            self._store.add_file(bundle.locations[entry.path], entry, link=link)
        # Before the manifest, so that readers who require a signature never find the bundle without it.
        if bundle.signature is not None and bundle.signature != self._signature(manifest):
            self._store.replace(_signature_path(manifest), bundle.signature)
        if not self._store.create(_manifest_path(manifest.organ, manifest.version), bundle.manifest_bytes):
            # A concurrent push was faster.
            self._refuse_other(bundle)
        return manifest

    def pull(self, digest: str, directory: Path) -> Manifest:
        """Copies a bundle and its signature to a new folder.

        Args:
            digest: the bundle.
            directory: the folder to create; its parent must exist.

        Raises:
            UnknownBundleError: the registry has no such bundle.
            InvalidBundleError: a file is missing or damaged.
            FileExistsError: the folder exists.
        """
        bundle = self.open(digest)
        with new_bundle_folder(directory) as partial:
            for entry in bundle.manifest.files:
                shutil.copyfile(bundle.locations[entry.path], partial / entry.path, follow_symlinks=False)
            (partial / MANIFEST_NAME).write_bytes(bundle.manifest_bytes)
            if bundle.signature is not None:
                (partial / SIGNATURE_NAME).write_bytes(bundle.signature)
            Bundle.open(partial).verify()
        return bundle.manifest

    def open(self, digest: str) -> Bundle:
        """Opens the bundle with a digest. Files of a remote root are fetched and checked first.

        Raises:
            UnknownBundleError: neither this registry nor a fallback has such a bundle.
            OSError: this registry is unavailable, and no fallback has it.
            InvalidBundleError: a file is missing or damaged.
            ExpertCapacityError: the files do not fit in the cache of this machine.
        """
        found, away = self._by_digest_or_error(digest)
        if found is None:
            for fallback in self._fallbacks:
                with suppress(UnknownBundleError):
                    return fallback.open(digest)
            raise away or self._unknown(digest)
        manifest, content = found
        return Bundle(
            manifest,
            {entry.path: self._locate(entry) for entry in manifest.files},
            manifest_bytes=content,
            signature=self._signature(manifest),
            fetch_again=self._store.fetch_again if isinstance(self._store, RemoteStore) else None,
        )

    def manifest(self, digest: str) -> Manifest:
        """The manifest of the bundle with a digest.

        Raises:
            UnknownBundleError: neither this registry nor a fallback has such a bundle.
            OSError: this registry is unavailable, and no fallback has it.
        """
        found, away = self._by_digest_or_error(digest)
        if found is not None:
            return found[0]
        for fallback in self._fallbacks:
            with suppress(UnknownBundleError):
                return fallback.manifest(digest)
        raise away or self._unknown(digest)

    def find(self, organ: str, version: str) -> Manifest:
        """The manifest of an organ's version.

        Raises:
            UnknownBundleError: there is none; the text lists the existing versions.
        """
        found = self._read(organ, version) if _is_valid(organ, version) else None
        if found is not None:
            return found[0]
        for fallback in self._fallbacks:
            with suppress(UnknownBundleError):
                return fallback.find(organ, version)
        raise UnknownBundleError(
            f"the registry {self._roots()} has no version {version[:100]!r} of organ {organ[:100]!r}; it has "
            f"{self._format_organ_versions(organ)}"
        )

    def list(
        self, organ: str | None = None, *, damaged: Callable[[InvalidBundleError], object] | None = None
    ) -> list[Manifest]:
        """All bundles, or an organ's, sorted by organ and version.

        This registry takes precedence over fallbacks.

        Args:
            organ: only this organ's bundles.
            damaged: called for every damaged manifest, which is then skipped.

        Raises:
            InvalidBundleError: a manifest is damaged and `damaged` is None.
        """
        manifests: dict[tuple[str, str], Manifest] = {}
        for fallback in reversed(self._fallbacks):
            known = fallback.list(organ, damaged=damaged)
            manifests |= {(manifest.organ, manifest.version): manifest for manifest in known}
        for known_organ, version in self._versions(organ):
            try:
                found = self._read(known_organ, version)
            except InvalidBundleError as error:
                if damaged is None:
                    raise
                damaged(error)
                continue
            if found is not None:
                manifests[known_organ, version] = found[0]
        return sorted(manifests.values(), key=lambda manifest: (manifest.organ, version_key(manifest.version)))

    def check_exists(self) -> None:
        """Checks that the registry exists, for callers that must not take a missing one for an empty one.

        Raises:
            FileNotFoundError: neither its folder nor one of its fallbacks exists.
        """
        stores = [registry._store for registry in (self, *self._fallbacks)]
        if not any(isinstance(store, RemoteStore) or store.exists for store in stores):
            raise FileNotFoundError(2, "the folder does not exist")

    def is_signed(self, manifest: Manifest) -> bool:
        """Whether a bundle of this registry or a fallback has a signature, valid or not."""
        return self._signature(manifest) is not None or any(
            fallback.is_signed(manifest) for fallback in self._fallbacks
        )

    def _format_organ_versions(self, organ: str) -> str:
        """The versions of an organ as text, or all organs if there are none."""
        if versions := [known.version for known in self.list(organ, damaged=str)]:
            return ", ".join(versions)
        organs = ", ".join(dict.fromkeys(known.organ for known in self.list(damaged=str)))
        return f"none of it, and bundles of {organs}" if organs else "no bundles at all"

    def _unknown(self, digest: str) -> UnknownBundleError:
        return UnknownBundleError(
            f"the registry {self._roots()} has no bundle with the digest {digest[:100]!r}; push it there first"
        )

    def _roots(self) -> str:
        others = "".join(f" (nor {fallback._roots()})" for fallback in self._fallbacks)
        return f"{self.root}{others}"

    def _by_digest_or_error(self, digest: str) -> tuple[tuple[Manifest, bytes] | None, OSError | None]:
        """The bundle if it is here, or the error that prevented reading the registry."""
        candidates = [self._seen[digest]] if digest in self._seen else []
        away = None
        try:
            for organ, version in itertools.chain(candidates, self._versions(None)):
                # A damaged or unreadable manifest must not hide the others.
                try:
                    found = self._read(organ, version)
                except InvalidBundleError:
                    continue
                except OSError as error:
                    away = error
                    continue
                if found is not None and found[0].digest == digest:
                    return found, None
        except OSError as error:
            away = error
        return None, away

    def _locate(self, entry: FileEntry) -> Path:
        """The path of a file. A local fallback's file with the same digest is used instead of fetching it."""
        for fallback in self._fallbacks:
            if isinstance(fallback._store, LocalStore):
                with suppress(InvalidBundleError):
                    return fallback._store.locate_file(entry)
        return self._store.locate_file(entry)

    def _signature(self, manifest: Manifest) -> bytes | None:
        content = self._store.read(_signature_path(manifest))
        if content is not None and len(content) > MAX_SIGNATURE_BYTES:
            raise InvalidBundleError(f"{self.root}/{_signature_path(manifest)}: is too large to be a signature")
        return content

    def _versions(self, organ: str | None) -> Iterator[tuple[str, str]]:
        for known_organ, version in self._store.versions():
            if organ in (None, known_organ) and _is_valid(known_organ, version):
                yield known_organ, version

    def _read(self, organ: str, version: str) -> tuple[Manifest, bytes] | None:
        path = _manifest_path(organ, version)
        content = self._store.read(path)
        if content is None:
            return None
        manifest = Manifest.from_json(content, f"{self.root}/{path}")
        if (manifest.organ, manifest.version) != (organ, version):
            raise InvalidBundleError(
                f"{self.root}/{path}: says it is {manifest.organ} {manifest.version}; the registry was changed by hand"
            )
        self._seen[manifest.digest] = (organ, version)
        return manifest, content

    def _refuse_other(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        for registry in (self, *self._fallbacks):
            found = registry._read(manifest.organ, manifest.version)
            if found is not None:
                registry._refuse_unless_same(bundle, *found)

    def _refuse_unless_same(self, bundle: Bundle, existing: Manifest, content: bytes) -> None:
        manifest = bundle.manifest
        if existing.digest != manifest.digest:
            raise InvalidBundleError(
                f"the registry {self.root} has another bundle of {manifest.organ} {manifest.version} "
                f"({existing.digest[:12]}…, not {manifest.digest[:12]}…); versions are immutable, raise the version"
            )
        if bundle.signature is not None and content != bundle.manifest_bytes:
            raise SignatureError(
                f"the registry {self.root} has {manifest.organ} {manifest.version} with another spelling of "
                f"{MANIFEST_NAME}, which this signature does not cover; pull it from there and sign that"
            )


@contextmanager
def reading_registry(root: str) -> Iterator[None]:
    """Converts errors of the disk or the network into one that names the registry.

    Raises:
        RegistryUnavailableError: it is unavailable.
    """
    try:
        yield
    except OSError as error:
        # Errors of local files have `strerror`, those of object stores only their text.
        reason = error.strerror or str(error) or type(error).__name__
        where = f" ({error.filename})" if error.filename else ""
        hint = (
            "; give the user who reads it the right to, or name another one"
            if isinstance(error, PermissionError)
            else ""
        )
        raise RegistryUnavailableError(f"the registry {root} cannot be read: {reason}{where}{hint}") from error


def _manifest_path(organ: str, version: str) -> str:
    return f"bundles/{organ}/{version}/{MANIFEST_NAME}"


def _signature_path(manifest: Manifest) -> str:
    return f"bundles/{manifest.organ}/{manifest.version}/{manifest.digest}.sig"


def _is_valid(organ: str, version: str) -> bool:
    try:
        return bool(check_organ(organ) and check_version(version))
    except ValueError:
        return False


def _user_cache() -> Path:
    return user_folder("XDG_CACHE_HOME", ".cache") / "echovlm-ray" / "files"
