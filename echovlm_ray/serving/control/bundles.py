"""The registry of a deployment and the policy on which bundles may load, from the section `experts`."""

from pathlib import Path
from typing import TYPE_CHECKING

from echovlm_ray.checkpoint.layout import registry_root
from echovlm_ray.config import ExpertsSection, RolloutsSection
from echovlm_ray.serving.cluster.rollout_files import RolloutFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from experts.bundles.signing import SignaturePolicy
    from experts.registry.kept_bundles import KeptBundles
    from experts.registry.registry import Registry
    from experts.registry.source import RegistryLocation


def registry_location(section: ExpertsSection, checkpoint: Path) -> "RegistryLocation":
    """The configured registry; the checkpoint's own, where none is configured, and besides it in any case."""
    from experts.registry.source import RegistryLocation

    own = str(registry_root(checkpoint))
    if section.registry is None:
        return RegistryLocation(root=own)
    return RegistryLocation(
        root=section.registry,
        options=section.registry_options,
        cache_bytes=section.registry_cache_bytes,
        fallbacks=(own,),
    )


def open_registry(section: ExpertsSection, checkpoint: Path) -> "Registry":
    """The same, opened.

    Raises:
        RegistryError: there is no file system for experts.registry, or one of experts.registry_options is wrong.
    """
    from experts.errors import RegistryError

    try:
        return registry_location(section, checkpoint).open()
    except RegistryError as error:
        raise RegistryError(f"experts.registry: {error}") from None


def kept_folder(section: ExpertsSection, checkpoint: Path) -> Path:
    """Where this machine keeps its copies of bundles, each in a folder named by its digest."""
    return section.kept_bundles or RolloutFiles.of(RolloutsSection(), checkpoint).bundles


def open_kept(
    section: ExpertsSection, checkpoint: Path, in_use: "Callable[[], Collection[str]]" = tuple
) -> "KeptBundles":
    """The configured registry with this machine's copies of its bundles; `in_use` says which copies must stay.

    Raises:
        RegistryError: see `open_registry`.
    """
    from experts.registry.kept_bundles import KeptBundles

    folder = kept_folder(section, checkpoint)
    return KeptBundles(
        open_registry(section, checkpoint),
        folder,
        admit=signature_policy(section).admit,
        in_use=in_use,
    )


def signature_policy(section: ExpertsSection) -> "SignaturePolicy":
    """Which bundles may load."""
    from experts.bundles.signing import SignaturePolicy

    return SignaturePolicy(signatures=section.signatures, public_keys=section.public_keys)
