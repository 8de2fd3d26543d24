"""A router in this process that serves candidates; the gate's evaluator gets its address, as from Control.

The router's service, its engine, the vision encoder and the experts are those that serve; only Ray is missing.
"""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import torch
from transformers import GenerationConfig

from echovlm_ray.checkpoint.layout import backbone_directory, registry_root
from echovlm_ray.config import Config
from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.runner import ModelRunner
from echovlm_ray.model.checkpoint import load_backbone, load_vision_tower
from echovlm_ray.serving.gates.evaluator import GateEvaluator
from echovlm_ray.serving.grpc.interceptor import CallInterceptor
from echovlm_ray.serving.lm.outcomes import Outcomes
from echovlm_ray.serving.lm.pinning import ExpertSets
from echovlm_ray.serving.lm.request import ServedModel
from echovlm_ray.serving.lm.service import RouterService
from echovlm_ray.serving.served import ServedCheckpoint, served_checkpoint
from echovlm_ray.serving.vision.client import VisionClient
from echovlm_ray.serving.vision.service import VisionEncoderService
from echovlm_ray.vision.encoder import VisionEncoder, encoder_digest
from experts.group import ExpertGroup
from experts.kernels.registry import get_kernel
from experts.registry.registry import Registry
from experts.transport.inner_channel import PLAIN_CHANNELS
from protos import router_pb2_grpc, vision_pb2_grpc
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.local import LocalExperts
from router.gating.expert_gates import BundleGates, ExpertGates
from router.gating.organ_gate import OrganGate
from router.rollouts.settings import RolloutSettings
from router.rollouts.traffic import CandidateTraffic, TrafficPolicy

MAX_RESIDENT_BYTES = 2**33
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@dataclass(slots=True)
class GateSystem:
    """A router that answers, and what evaluates with it.

    Attributes:
        engine: of the router.
        outcomes: what the router would tell Control of its traffic.
        stable: organ → digest of its stable version.
        policies: how many candidates were offered.
    """

    evaluator: GateEvaluator
    engine: Engine
    sets: ExpertSets
    groups: Mapping[str, ExpertGroup]
    outcomes: Outcomes
    stable: Mapping[str, str]
    loop: asyncio.AbstractEventLoop
    policies: int = 0

    def offer(self, organ: str, digest: str) -> None:
        """Makes a bundle of the registry the organ's candidate, warm and without traffic, as one that has gates."""
        self.groups[organ].load(digest)
        self.policies += 1
        candidate = CandidateTraffic(organ=organ, digest=digest, rollout_id=f"{organ}-1", mode="shadow", percent=0)
        policy = TrafficPolicy(version=self.policies, stable=self.sets.policy.stable, candidates=(candidate,))
        asyncio.run_coroutine_threadsafe(self.sets.take_up(policy), self.loop).result()


@contextmanager
def gate_system(checkpoint: Path, *, questions_per_s: float) -> Iterator[GateSystem]:
    """Serves a split checkpoint until the block ends.

    Args:
        checkpoint: a folder that `echoray checkpoint split` or `demo` made; candidates come from its registry.
        questions_per_s: see `RolloutSettings.gate_questions_per_s`.
    """
    config = Config()
    served = served_checkpoint(config.model.model_copy(update={"checkpoint": checkpoint}))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    with TemporaryDirectory(prefix="echovlm-gates-") as folder:
        router_address, vision_address = f"unix:{folder}/router", f"unix:{folder}/vision"
        groups = _groups(served, config)
        engine, model = _engine(served, groups, config)
        sets = ExpertSets(
            engine.dispatcher,
            OrganGate([], default_organ=config.model.default_organ, max_organs=config.model.max_organs_per_request),
            model.expert_set,
            model.gates,
            read=model.read_gates,
            forget=engine.evict_bundle,
        )
        outcomes = Outcomes()
        vision = VisionClient(lambda: [vision_address], PLAIN_CHANNELS)
        service = RouterService(engine, model, sets, vision, config.router, outcomes)
        starting = _serve(served, service, config, router_address, vision_address)
        servers, encoder = asyncio.run_coroutine_threadsafe(starting, loop).result()
        engine.start()
        evaluator = GateEvaluator(
            served,
            lambda: [router_address],
            PLAIN_CHANNELS,
            RolloutSettings(gate_questions_per_s=questions_per_s),
            config.gateway,
            config.router,
            config.model.default_organ,
        )
        stable = {member.organ: member.bundle_digest for member in served.expert_set.members}
        try:
            yield GateSystem(evaluator, engine, sets, groups, outcomes, stable, loop)
        finally:
            for server in reversed(servers):
                asyncio.run_coroutine_threadsafe(server.stop(0), loop).result()
            asyncio.run_coroutine_threadsafe(encoder.close(), loop).result()
            engine.stop()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


def _groups(served: ServedCheckpoint, config: Config) -> dict[str, ExpertGroup]:
    groups = {}
    for member in served.expert_set.members:
        registry, kernel = Registry(registry_root(served.directory)), get_kernel(config.experts.kernel)
        group = ExpertGroup(member.organ, registry, kernel, device="cpu", max_resident_bytes=MAX_RESIDENT_BYTES)
        group.load(member.bundle_digest)
        groups[member.organ] = group
    return groups


def _engine(served: ServedCheckpoint, groups: Mapping[str, ExpertGroup], config: Config) -> tuple[Engine, ServedModel]:
    backbone = load_backbone(served.directory, dtype=torch.float32, device="cpu")
    text, limits = backbone.config.text_config, config.router
    registry = Registry(registry_root(served.directory))

    def read(digest: str) -> BundleGates:
        return BundleGates.read(registry.open(digest), num_layers=text.num_hidden_layers, dtype=torch.float32)

    gates = {member.bundle_digest: read(member.bundle_digest) for member in served.expert_set.members}
    dispatcher = Dispatcher(LocalExperts(groups), top_k=text.num_experts_per_tok, norm_topk_prob=text.norm_topk_prob)
    dispatcher.add_set(ExpertGates.of(served.expert_set, gates))
    engine = Engine(
        ModelRunner(backbone, dispatcher, kv_cache_tokens=limits.kv_cache_tokens),
        max_batch_size=limits.max_batch_size,
        max_queue=limits.max_queue,
        max_prefill_tokens=limits.max_prefill_tokens,
        max_request_s=limits.max_request_s,
    )
    ends = GenerationConfig.from_pretrained(backbone_directory(served.directory), local_files_only=True).eos_token_id
    end_token_ids = frozenset([ends] if isinstance(ends, int) else ends)
    return engine, ServedModel(backbone.config, served.expert_set, gates, read, end_token_ids)


async def _serve(
    served: ServedCheckpoint, service: RouterService, config: Config, router_address: str, vision_address: str
) -> tuple[list[grpc.aio.Server], VisionEncoder]:
    tower = load_vision_tower(served.directory, dtype=torch.float32, device="cpu")
    encoder = VisionEncoder(
        tower,
        encoder_digest(served.index.backbone_digest, tower.dtype),
        cache_bytes=config.vision.cache_bytes,
        max_batch_patches=config.vision.max_batch_patches,
        max_queue=config.vision.max_queue,
    )
    servers = []
    parts: list[tuple[Any, Any, str]] = [
        (vision_pb2_grpc.add_VisionEncoderServicer_to_server, VisionEncoderService(encoder), vision_address),
        (router_pb2_grpc.add_RouterServicer_to_server, service, router_address),
    ]
    for register, servicer, address in parts:
        server = grpc.aio.server(interceptors=[CallInterceptor(None)], options=UNLIMITED)
        register(servicer, server)
        server.add_insecure_port(address)
        await server.start()
        servers.append(server)
    return servers, encoder
