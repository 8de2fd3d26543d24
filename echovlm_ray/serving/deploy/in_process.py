"""Serves a checkpoint without a running system: gateway, router, experts and vision encoder in this process.

It uses the same parts as the service, so the answers are the same. They listen on Unix sockets in a private folder.
"""

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import torch

from echovlm_ray.config import Config
from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.vision_encoder import VisionEncoder, encoder_digest
from echovlm_ray.model.checkpoint import load_vision_tower
from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.serving.cluster.endpoints import Endpoints
from echovlm_ray.serving.cluster.served import ServedCheckpoint, served_checkpoint
from echovlm_ray.serving.cluster.settings import ROUTER, VISION, RouterSettings, VisionSettings, settings_of
from echovlm_ray.serving.control.bundles import open_registry
from echovlm_ray.serving.core.description import ModelDescription, OrganDescription
from echovlm_ray.serving.core.parts import GenerateParts
from echovlm_ray.serving.deploy.replica import device_of, dtype_of
from echovlm_ray.serving.deploy.router_deployment import build_engine
from echovlm_ray.serving.grpc.gateway import GatewayService
from echovlm_ray.serving.grpc.interceptor import CallInterceptor
from echovlm_ray.serving.lm.outcomes import Outcomes
from echovlm_ray.serving.lm.pinning import ExpertSets
from echovlm_ray.serving.lm.router_client import RouterClient
from echovlm_ray.serving.lm.service import RouterService
from echovlm_ray.serving.vision.client import VisionClient
from echovlm_ray.serving.vision.service import VisionEncoderService
from experts.transport.inner_channel import PLAIN_CHANNELS
from protos import echovlm_pb2_grpc, router_pb2_grpc, vision_pb2_grpc

if TYPE_CHECKING:
    from experts.registry.registry import Registry


@dataclass(frozen=True, slots=True)
class AnsweringRouter:
    """A router with its experts and a vision encoder; nothing of it is a process of its own.

    Attributes:
        address: where its gRPC service listens.
        outcomes: what it would say to Control of its traffic.
    """

    address: str
    engine: Engine
    expert_sets: ExpertSets
    outcomes: Outcomes


@asynccontextmanager
async def answering_router(config: Config, served: ServedCheckpoint, folder: Path) -> AsyncIterator[AnsweringRouter]:
    """A router that serves a split checkpoint until the block ends.

    Args:
        config: with `router.experts: local`.
        served: the checkpoint.
        folder: for the sockets.
    """
    settings = settings_of(config, served.organs, "loopback")
    router_settings, vision_settings = settings[ROUTER], settings[VISION]
    assert isinstance(router_settings, RouterSettings)
    assert isinstance(vision_settings, VisionSettings)
    engine, model, organ_gate = build_engine(router_settings, served, device_of(router_settings), Endpoints({}))
    tower = load_vision_tower(served.directory, dtype=dtype_of(vision_settings), device=device_of(vision_settings))
    encoder = VisionEncoder(
        tower,
        encoder_digest(served.index.backbone_digest, tower.dtype),
        cache_bytes=config.vision.cache_bytes,
        max_batch_patches=config.vision.max_batch_patches,
        max_queue=config.vision.max_queue,
    )
    router_address, vision_address = f"unix:{folder}/router", f"unix:{folder}/vision"
    vision = VisionClient(lambda: [vision_address], PLAIN_CHANNELS)
    expert_sets = ExpertSets(
        engine.dispatcher,
        organ_gate,
        model.expert_set,
        model.gates,
        read=model.read_gates,
        forget=engine.evict_bundle,
    )
    outcomes = Outcomes()
    router = RouterService(engine, model, expert_sets, vision, config.router, outcomes)
    async with AsyncExitStack() as stack:
        engine.start()
        stack.callback(engine.stop)
        stack.push_async_callback(encoder.close)
        stack.push_async_callback(vision.close)
        register = vision_pb2_grpc.add_VisionEncoderServicer_to_server
        await stack.enter_async_context(_listening(vision_address, register, VisionEncoderService(encoder)))
        register = router_pb2_grpc.add_RouterServicer_to_server
        await stack.enter_async_context(_listening(router_address, register, router))
        yield AnsweringRouter(router_address, engine, expert_sets, outcomes)


@asynccontextmanager
async def answering_checkpoint(checkpoint: Path, *, threads: int = 1) -> AsyncIterator[str]:
    """The address of a gateway that serves a split checkpoint within the block.

    Args:
        checkpoint: a folder that `echoray checkpoint split` made, with tokenizer and image processor.
        threads: torch threads.

    Raises:
        ValueError: the folder is no such checkpoint.
    """
    torch.set_num_threads(threads)
    config = local_configuration(checkpoint)
    served = served_checkpoint(config.model)
    if served.missing_text_files:
        raise ValueError(f"{checkpoint} has no {' and no '.join(served.missing_text_files)} in its backbone/ folder")
    processor = EchoVLMProcessor.from_pretrained(served.directory)
    description = _describe(served, open_registry(config.experts, served.directory), config)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="echovlm-eval-"))
        router = await stack.enter_async_context(answering_router(config, served, Path(folder)))
        client = RouterClient(lambda: [router.address], PLAIN_CHANNELS)
        stack.push_async_callback(client.close)
        parts = GenerateParts(processor, client, lambda: description, gateway=config.gateway, limits=config.router)
        stack.push_async_callback(parts.close)
        await parts.start()
        address = f"unix:{folder}/gateway"
        register = echovlm_pb2_grpc.add_EchoVLMServicer_to_server
        await stack.enter_async_context(_listening(address, register, GatewayService(parts)))
        yield address


def local_configuration(checkpoint: Path) -> Config:
    """What a checkpoint is served by in one process."""
    config = Config()
    model = config.model.model_copy(update={"checkpoint": checkpoint})
    router = config.router.model_copy(update={"experts": "local"})
    section = _default_organ(checkpoint, config)
    return config.model_copy(update={"model": model.model_copy(update=section), "router": router})


def _default_organ(checkpoint: Path, config: Config) -> dict[str, str]:
    """A checkpoint without the usual default organ falls back on its first one."""
    from echovlm_ray.checkpoint.layout import read_index

    organs = [entry.organ for entry in read_index(checkpoint).organs]
    return {} if config.model.default_organ in organs else {"default_organ": organs[0]}


@asynccontextmanager
async def _listening(
    address: str, register: Callable[[Any, grpc.aio.Server], None], servicer: object
) -> AsyncIterator[None]:
    server = grpc.aio.server(
        interceptors=[CallInterceptor(None)],
        options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
    )
    register(servicer, server)
    server.add_insecure_port(address)
    await server.start()
    try:
        yield
    finally:
        await server.stop(0)


def _describe(served: ServedCheckpoint, registry: "Registry", config: Config) -> ModelDescription:
    organs = []
    for member in served.expert_set.members:
        manifest = registry.find(member.organ, served.versions[member.organ])
        organs.append(OrganDescription(manifest.organ, manifest.version, member.bundle_digest, manifest.num_experts))
    return ModelDescription(
        name=served.index.name,
        version=served.index.version,
        description=served.index.description,
        backbone_digest=served.index.backbone_digest,
        expert_set_id=served.expert_set.id,
        organs=tuple(organs),
        default_organ=config.model.default_organ,
    )
