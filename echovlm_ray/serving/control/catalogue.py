"""What bundles there are, by digest: a registry is asked by organ and version, and everybody else speaks of digests."""

import logging
import threading

from experts.errors import RegistryError, UnknownBundleError
from experts.manifest import Manifest
from experts.registry import Registry

logger = logging.getLogger(__name__)


class Catalogue:
    """The manifests of a registry. Bundles never change, so what was read once is kept. Safe from several threads."""

    def __init__(self, registry: Registry) -> None:
        """Takes the registry; nothing is read yet."""
        self._registry = registry
        self._lock = threading.Lock()
        self._manifests: dict[str, Manifest] = {}

    def list(self, organ: str | None = None) -> list[Manifest]:
        """All bundles, or an organ's, by organ and then from the oldest version to the newest; read anew.

        One damaged manifest must take neither the others nor Control itself out of service.
        """
        manifests = self._registry.list(organ, damaged=lambda error: logger.warning("passed over: %s", error))
        with self._lock:
            self._manifests |= {manifest.digest: manifest for manifest in manifests}
        return manifests

    def manifest(self, digest: str) -> Manifest:
        """The manifest of a bundle.

        Raises:
            UnknownBundleError: the registry does not have it.
        """
        with self._lock:
            known = self._manifests.get(digest)
        if known is None:
            self.list()
            with self._lock:
                known = self._manifests.get(digest)
        if known is None:
            raise UnknownBundleError(
                f"the registry {self._registry.root} has no bundle with the digest {digest[:100]!r}; push it first"
            )
        return known

    def version(self, digest: str) -> str:
        """The version of a bundle; "" where the registry does not have it any more, or cannot be read."""
        try:
            return self.manifest(digest).version
        except (UnknownBundleError, RegistryError):
            # A name for people; that the registry is away is told by what needs it.
            return ""

    def digest_of(self, organ: str, version: str) -> str:
        """The digest of an organ's version.

        Raises:
            UnknownBundleError: there is none; the text names the versions that there are.
        """
        return self._registry.find(organ, version).digest
