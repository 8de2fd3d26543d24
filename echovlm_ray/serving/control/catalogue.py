"""The bundles of a registry by digest; the registry itself finds them by organ and version."""

import logging
import threading
from collections.abc import Iterable
from contextlib import suppress

from experts.bundles.manifest import Manifest
from experts.errors import RegistryError, UnknownBundleError
from experts.registry.kept_bundles import KeptBundles
from experts.registry.registry import Registry, reading_registry

logger = logging.getLogger(__name__)


class Catalogue:
    """The manifests of a registry. Bundles never change, so what was read once is kept. Safe from several threads."""

    def __init__(self, registry: Registry, kept: KeptBundles | None = None) -> None:
        """Takes the registry, and the copies that know a bundle while it is away, if there are any; reads nothing."""
        self._registry = registry
        self._kept = kept
        self._lock = threading.Lock()
        self._manifests: dict[str, Manifest] = {}

    def known(self, digests: Iterable[str]) -> list[Manifest]:
        """The manifests of those bundles that something still knows, without an error for the others."""
        found = []
        for digest in digests:
            with suppress(UnknownBundleError, RegistryError):
                found.append(self.manifest(digest))
        return found

    def list(self, organ: str | None = None) -> list[Manifest]:
        """All bundles, or an organ's, by organ and then from the oldest version to the newest; read again.

        One damaged manifest must take neither the others nor Control itself out of service.

        Raises:
            RegistryUnavailableError: the registry cannot be read.
        """
        with reading_registry(self._registry.root):
            manifests = self._registry.list(organ, damaged=lambda error: logger.warning("passed over: %s", error))
            if not manifests:
                self._registry.check_exists()
        with self._lock:
            self._manifests |= {manifest.digest: manifest for manifest in manifests}
        return manifests

    def manifest(self, digest: str) -> Manifest:
        """The manifest of a bundle.

        Raises:
            UnknownBundleError: neither the registry nor a copy has it.
            RegistryUnavailableError: no copy has it, and the registry cannot be read.
        """
        with self._lock:
            known = self._manifests.get(digest)
        if known is None:
            with reading_registry(self._registry.root):
                known = (self._kept or self._registry).manifest(digest)
            with self._lock:
                self._manifests[digest] = known
        return known

    def version(self, digest: str) -> str:
        """The version of a bundle, whose manifest is kept from then on; "" where nothing knows it any more."""
        try:
            return self.manifest(digest).version
        except (UnknownBundleError, RegistryError):
            # A name for people; what needs the registry says that it is away.
            return ""

    def digest_of(self, organ: str, version: str) -> str:
        """The digest of an organ's version.

        Raises:
            UnknownBundleError: there is none; the text names the versions that there are.
            RegistryUnavailableError: the registry cannot be read.
        """
        with reading_registry(self._registry.root):
            try:
                return self._registry.find(organ, version).digest
            except UnknownBundleError:
                self._registry.check_exists()
                raise
