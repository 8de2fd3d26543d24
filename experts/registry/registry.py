"""The registry of bundles: by organ and version, under any root that fsspec can reach.

    files/<sha256>.safetensors              every file once, however many bundles have it
    bundles/<organ>/<version>/<digest>.sig   the signature of the bundle of this digest, if it is signed
    bundles/<organ>/<version>/manifest.json  written last: a bundle without it does not exist

Nothing but a signature is ever replaced. A push that dies half-way leaves files that no manifest names and no reader
sees. A signature carries the digest in its name, so that of two pushes of different bundles the loser's does no harm.
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
from experts.errors import InvalidBundleError, RegistryAwayError, RegistryError, SignatureError, UnknownBundleError
from experts.private_folder import user_folder
from experts.registry.file_cache import FileCache
from experts.registry.store import LocalStore, RemoteStore

DEFAULT_CACHE_BYTES = 64 * 1024**3


class Registry:
    """One registry. Safe to use from several threads and processes at once."""

    def __init__(
        self,
        root: str | Path,
        *,
        options: Mapping[str, str | int | bool] | None = None,
        cache_directory: Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        fallbacks: Sequence["Registry"] = (),
    ) -> None:
        """Opens a registry; a root that does not exist yet is an empty one.

        Args:
            root: a folder, or a URL that fsspec knows, for example "s3://bucket/experts".
            options: what fsspec's file system for that URL takes, for example `endpoint_url` for S3.
            cache_directory: where files of a remote root are kept once fetched; by default `echovlm-ray/files` in the
                user's cache folder. Local roots are read in place.
            cache_bytes: the most bytes kept there.
            fallbacks: registries that are read, and never written, where this one does not have a bundle.

        Raises:
            RegistryError: fsspec knows no such URL, the package for it is not installed, or an option is wrong.
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
        # Where a digest was last seen; only a hint, the manifest there is read again each time.
        self._seen: dict[str, tuple[str, str]] = {}

    def push(self, bundle_directory: Path, *, link: bool = False) -> Manifest:
        """Adds the bundle in a folder, after checking all of it. Pushing it again changes nothing.

        A signature comes along. Whether it is a good one is for those to say who load the bundle; one that was added
        or renewed since the last push replaces the one that is there.

        Args:
            bundle_directory: the bundle's folder.
            link: hard-link the files into a local root instead of copying them. For a folder that will not be written
                to again: its files then are the registry's files.

        Returns:
            Its manifest.

        Raises:
            InvalidBundleError: the bundle is not what its manifest says, or the registry has another bundle of this
                organ and version: versions are immutable.
            SignatureError: the signature covers another spelling of the manifest than the registry has.
        """
        bundle = Bundle.open(bundle_directory)
        # The store checks the digests: each file is read once.
        bundle.verify(digests=False)
        manifest = bundle.manifest
        self._refuse_other(bundle)
        for entry in manifest.files:
            self._store.add_file(bundle.locations[entry.path], entry, link=link)
        # Before the manifest: where signatures are required, the bundle must not be found without its own.
        if bundle.signature is not None and bundle.signature != self._signature(manifest):
            self._store.replace(_signature_path(manifest), bundle.signature)
        if not self._store.create(_manifest_path(manifest.organ, manifest.version), bundle.manifest_bytes):
            # Another one was faster.
            self._refuse_other(bundle)
        return manifest

    def pull(self, digest: str, directory: Path) -> Manifest:
        """Copies a bundle into a folder of its own, its signature included.

        Args:
            digest: the bundle.
            directory: the folder to make; its parent exists.

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
        """The bundle with a digest. Files of a remote root are fetched first, and checked.

        Raises:
            UnknownBundleError: neither this registry nor a fallback has such a bundle.
            OSError: no fallback has it, and this registry cannot be read.
            InvalidBundleError: a file is missing or damaged.
            ExpertCapacityError: there is no room for the files of a remote root on this machine.
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
            OSError: no fallback has it, and this registry cannot be read.
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
            UnknownBundleError: there is none; the text names the versions that there are.
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
        """All bundles, or an organ's, by organ and then from the oldest version to the newest.

        Of a version that a fallback has too, the one here counts.

        Args:
            organ: only this one's.
            damaged: called with every manifest that is damaged, which is then left out.

        Raises:
            InvalidBundleError: a manifest is damaged, and `damaged` is not given.
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
        """Checks that there is a registry, for those to whom an empty one would say that bundles were never there.

        Raises:
            FileNotFoundError: it is a folder that does not exist, and so are its fallbacks.
        """
        stores = [registry._store for registry in (self, *self._fallbacks)]
        if not any(isinstance(store, RemoteStore) or store.exists for store in stores):
            raise FileNotFoundError(2, "the folder does not exist")

    def is_signed(self, manifest: Manifest) -> bool:
        """Whether a bundle of this registry or a fallback has a signature, good or not."""
        return self._signature(manifest) is not None or any(
            fallback.is_signed(manifest) for fallback in self._fallbacks
        )

    def _format_organ_versions(self, organ: str) -> str:
        """The versions of an organ, or where there are none, the organs that there are."""
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
        """The bundle if it is found here, or what kept this registry from being read."""
        candidates = [self._seen[digest]] if digest in self._seen else []
        away = None
        try:
            for organ, version in itertools.chain(candidates, self._versions(None)):
                # One manifest that is damaged or may not be read must not hide the others.
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
        """Where a file lies; one that a fallback has on this machine need not be fetched, its digest says it all."""
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
    """Turns what the disk or the network says while a registry is read into words that name the registry.

    Raises:
        RegistryAwayError: it cannot be read.
    """
    try:
        yield
    except OSError as error:
        # Local files say what is wrong in `strerror`, object stores in their own words.
        reason = error.strerror or str(error) or type(error).__name__
        where = f" ({error.filename})" if error.filename else ""
        hint = (
            "; give the user who reads it the right to, or name another one"
            if isinstance(error, PermissionError)
            else ""
        )
        raise RegistryAwayError(f"the registry {root} cannot be read: {reason}{where}{hint}") from error


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
