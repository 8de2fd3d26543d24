"""The bundles of a registry by digest. The registry finds them by organ and version."""

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
    """A cache of a registry's manifests, which are immutable. Thread-safe."""

    def __init__(self, registry: Registry, kept: KeptBundles | None = None) -> None:
        """Takes the registry, and the local copies for times when it is unavailable. Reads nothing yet."""
        self._registry = registry
        self._kept = kept
        self._lock = threading.Lock()
        self._manifests: dict[str, Manifest] = {}

    def known(self, digests: Iterable[str]) -> list[Manifest]:
        """The manifests of the known bundles, without errors for unknown ones."""
        found = []
        for digest in digests:
            with suppress(UnknownBundleError, RegistryError):
                found.append(self.manifest(digest))
        return found

    def list(self, organ: str | None = None) -> list[Manifest]:
        """All bundles, or an organ's, sorted by organ and version. Reads the registry again.

        A damaged manifest must not affect the other bundles or Control.

        Raises:
            RegistryUnavailableError: the registry is unavailable.
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
            UnknownBundleError: neither the registry nor a local copy has it.
            RegistryUnavailableError: there is no local copy, and the registry is unavailable.
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
        """The version of a bundle, whose manifest is cached; "" if it is unknown."""
        try:
            return self.manifest(digest).version
        except (UnknownBundleError, RegistryError):
            # Only for display; operations that need the registry report that it is unavailable.
            return ""

    def digest_of(self, organ: str, version: str) -> str:
        """The digest of an organ's version.

        Raises:
            UnknownBundleError: there is none; the text lists the existing versions.
            RegistryUnavailableError: the registry is unavailable.
        """
        with reading_registry(self._registry.root):
            try:
                return self._registry.find(organ, version).digest
            except UnknownBundleError:
                self._registry.check_exists()
                raise
