"""Further versions of a bundle, with other weights: what a model developer would push."""

from collections.abc import Callable
from pathlib import Path

import torch

from experts.bundles.bundle import Bundle
from experts.bundles.manifest import BundleDescription, Manifest
from experts.bundles.writer import write_bundle


def amplified(tensor: torch.Tensor) -> torch.Tensor:
    """Weights with which a model that has learnt something answers in other words."""
    return tensor * 3


def not_a_number(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, torch.nan)


def changed_description(source: Bundle, version: str, **fields: object) -> BundleDescription:
    """A bundle's description with another version and other fields; without a probe unless the fields have one."""
    content = source.manifest.model_dump(exclude={"format", "files", "probe"})
    return BundleDescription.model_validate({**content, "version": version, **fields})


def changed_bundle(
    directory: Path,
    source: Bundle,
    version: str,
    change: Callable[[torch.Tensor], torch.Tensor] = amplified,
    **fields: object,
) -> Manifest:
    """A bundle like another one, with its experts' weights changed; gates stay as they are."""

    def tensor(name: str) -> torch.Tensor:
        found = source.tensor(name)
        return change(found) if "experts" in name else found

    return write_bundle(directory, changed_description(source, version, **fields), tensor)
