"""Small bundles, made the way every bundle is made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.bundles.layout import expected_tensors
from experts.bundles.manifest import BundleDescription, Manifest
from experts.bundles.writer import write_bundle
from experts.group import ExpertGroup
from experts.kernels.registry import get_kernel
from experts.registry.registry import Registry

BACKBONE = "b" * 64

Describe = Callable[..., BundleDescription]
MakeTensors = Callable[..., dict[str, torch.Tensor]]
MakeBundle = Callable[..., Path]


@pytest.fixture
def describe() -> Describe:
    def make(**changes: Any) -> BundleDescription:
        fields: dict[str, Any] = {
            "name": "breast experts",
            "organ": "breast",
            "version": "1.0.0",
            "description": "for tests",
            "authors": "the tests",
            "license": "Apache-2.0",
            "intended_use": "tests only",
            "backbone_digest": BACKBONE,
            "num_layers": 2,
            "num_experts": 3,
            "hidden_size": 16,
            "intermediate_size": 24,
            "dtype": "float32",
        }
        return BundleDescription(**{**fields, **changes})

    return make


@pytest.fixture
def make_tensors() -> MakeTensors:
    def make(description: BundleDescription, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: (torch.randn(shape, generator=generator) / 4).to(dtype)
            for name, (dtype, shape) in expected_tensors(description).items()
        }

    return make


@pytest.fixture
def make_bundle(tmp_path: Path, describe: Describe, make_tensors: MakeTensors) -> MakeBundle:
    def make(name: str = "bundle", seed: int = 0, **changes: Any) -> Path:
        description = describe(**changes)
        directory = tmp_path / name
        write_bundle(directory, description, make_tensors(description, seed).__getitem__)
        return directory

    return make


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def pushed(registry: Registry, make_bundle: MakeBundle) -> Manifest:
    return registry.push(make_bundle())


@pytest.fixture
def group(registry: Registry) -> ExpertGroup:
    return ExpertGroup("breast", registry, get_kernel("reference"), device="cpu", max_resident_bytes=10**8)
