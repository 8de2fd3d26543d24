"""A golden checkpoint taken apart: a backbone folder and a registry of bundles, written here and not by the tools."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from experts.bundles.bundle import Bundle
from experts.bundles.layout import PROTOTYPE_TENSOR
from experts.bundles.manifest import BundleDescription, DTypeName
from experts.bundles.writer import write_bundle
from experts.registry.registry import Registry
from router.gating.expert_set import ExpertSet, ExpertSetMember, Routing

BACKBONE_DIGEST = "b" * 64
DTYPES: dict[torch.dtype, DTypeName] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class SplitGolden:
    """What was written, and the expert set of it.

    Attributes:
        tensors: the whole checkpoint.
        config: its config.json.
    """

    backbone: Path
    registry: Path
    expert_set: ExpertSet
    tensors: dict[str, torch.Tensor]
    config: dict[str, object]

    def bundles(self) -> dict[str, Bundle]:
        registry = Registry(self.registry)
        return {member.bundle_digest: registry.open(member.bundle_digest) for member in self.expert_set.members}


def split_golden(
    checkpoint: Path,
    directory: Path,
    groups: Mapping[str, Sequence[int]],
    routing: Routing,
    *,
    synonyms: Mapping[str, tuple[str, ...]] | None = None,
    prototypes: Mapping[str, torch.Tensor] | None = None,
) -> SplitGolden:
    """Splits a checkpoint; `groups` has each organ's experts, in the set's order."""
    tensors = load_file(checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    backbone = directory / "backbone"
    backbone.mkdir(parents=True)
    routed = (".moe.gate.", ".moe.experts.")
    kept = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in routed)}
    save_file(kept, backbone / "model.safetensors", metadata={"format": "pt"})
    (backbone / "config.json").write_text(json.dumps(config))
    (backbone / "generation_config.json").write_bytes((checkpoint / "generation_config.json").read_bytes())
    members = []
    for organ, experts in groups.items():
        digest = write_golden_bundle(
            tensors,
            config,
            directory,
            organ,
            experts,
            synonyms=(synonyms or {}).get(organ, ()),
            prototype_D=(prototypes or {}).get(organ),
        )
        members.append(ExpertSetMember(organ=organ, bundle_digest=digest))
    expert_set = ExpertSet(backbone_digest=BACKBONE_DIGEST, routing=routing, members=tuple(members))
    return SplitGolden(backbone, directory / "registry", expert_set, tensors, config)


def write_golden_bundle(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    directory: Path,
    organ: str,
    experts: Sequence[int],
    *,
    version: str = "1.0.0",
    change: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, tensor: tensor,
    synonyms: tuple[str, ...] = (),
    prototype_D: torch.Tensor | None = None,
) -> str:
    """Puts a bundle of some of a checkpoint's experts into its registry; returns the digest."""
    description = BundleDescription(
        name=f"golden-{organ}",
        organ=organ,
        version=version,
        description="Experts of a golden checkpoint.",
        authors="tests",
        license="Apache-2.0",
        intended_use="tests",
        backbone_digest=BACKBONE_DIGEST,
        num_layers=config["num_hidden_layers"],
        num_experts=len(experts),
        hidden_size=config["hidden_size"],
        intermediate_size=config["moe_intermediate_size"],
        dtype=DTYPES[tensors["model.layers.0.moe.gate.weight"].dtype],
        organ_synonyms=synonyms,
        has_prototype=prototype_D is not None,
    )

    def source(name: str) -> torch.Tensor:
        if name == PROTOTYPE_TENSOR:
            assert prototype_D is not None
            return prototype_D
        return change(name, released(name)).contiguous()

    def released(name: str) -> torch.Tensor:
        _, layer, kind, *rest = name.split(".")
        if kind == "gate":
            return tensors[f"model.layers.{layer}.moe.gate.weight"][list(experts)]
        return tensors[f"model.layers.{layer}.moe.experts.{experts[int(rest[0])]}.{rest[1]}.weight"]

    target = directory / f"bundle-{organ}-{version}"
    write_bundle(target, description, source)
    return Registry(directory / "registry").push(target).digest
