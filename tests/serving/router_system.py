"""A router's service over a running engine, as the deployment puts it together."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from echovlm_ray.config import RouterSection
from echovlm_ray.engine.engine import Engine
from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.serving.lm.outcomes import Outcomes
from echovlm_ray.serving.lm.pinning import ExpertSets
from echovlm_ray.serving.lm.request import ServedModel
from echovlm_ray.serving.lm.service import RouterService
from echovlm_ray.serving.vision.client import VisionClient
from experts.registry.registry import Registry
from router.gating.expert_gates import BundleGates
from router.gating.organ_gate import OrganGate
from tests.split_golden import SplitGolden

GateReader = Callable[[str, Collection[str]], BundleGates]


@dataclass
class RouterParts:
    """The service and what a test looks into."""

    service: RouterService
    expert_sets: ExpertSets
    outcomes: Outcomes


def gate_reader(registry: Path, num_layers: int, dtype: torch.dtype) -> GateReader:
    opened = Registry(registry)
    return lambda digest, in_use: BundleGates.read(opened.open(digest), num_layers=num_layers, dtype=dtype)


def served_model(split: SplitGolden, end_token_ids: frozenset[int]) -> ServedModel:
    config = EchoVLMConfig.from_pretrained(split.backbone)
    dtype = split.tensors["lm_head.weight"].dtype
    read = gate_reader(split.registry, config.text_config.num_hidden_layers, dtype)
    gates = {member.bundle_digest: read(member.bundle_digest, ()) for member in split.expert_set.members}
    return ServedModel(config, split.expert_set, gates, read, end_token_ids)


def router_parts(
    engine: Engine,
    split: SplitGolden,
    vision: VisionClient,
    limits: RouterSection,
    *,
    end_token_ids: frozenset[int],
    default_organ: str = "breast",
    replayed: Any = None,
) -> RouterParts:
    model = served_model(split, end_token_ids)
    expert_sets = ExpertSets(
        engine.dispatcher,
        OrganGate([], default_organ=default_organ, max_organs=2),
        model.expert_set,
        model.gates,
        read=model.read_gates,
        forget=engine.evict_bundle,
    )
    outcomes = Outcomes()
    more = () if replayed is None else (replayed,)
    service = RouterService(engine, model, expert_sets, vision, limits, outcomes, *more)
    return RouterParts(service, expert_sets, outcomes)
