"""A checkpoint answers without a running system: gateway, router, experts and vision encoder in this one process.

They are the parts that are served, so an answer is the one that the service would give. They listen on Unix sockets in
a folder that is this user's alone.
"""

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import torch

from echovlm_ray.config import Config
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


@asynccontextmanager
async def answering_checkpoint(checkpoint: Path, *, threads: int = 1) -> AsyncIterator[str]:
    """The address of a gateway that serves a split checkpoint until the block ends.

    Args:
        checkpoint: a folder that `echoray checkpoint split` made, with tokenizer and image processor.
        threads: torch threads.

    Raises:
        ValueError: the folder is no such checkpoint.
    """
    torch.set_num_threads(threads)
    config = _configuration(checkpoint)
    served = served_checkpoint(config.model)
    if served.missing_text_files:
        raise ValueError(f"{checkpoint} has no {' and no '.join(served.missing_text_files)} in its backbone/ folder")
    processor = EchoVLMProcessor.from_pretrained(served.directory)
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
    description = _describe(served, open_registry(config.experts, served.directory), config)
    with tempfile.TemporaryDirectory(prefix="echovlm-eval-") as folder:
        sockets = {name: f"unix:{folder}/{name}" for name in ("gateway", "router", "vision")}
        vision = VisionClient(lambda: [sockets["vision"]], PLAIN_CHANNELS)
        expert_sets = ExpertSets(
            engine.dispatcher,
            organ_gate,
            model.expert_set,
            model.gates,
            read=model.read_gates,
            forget=engine.evict_bundle,
        )
        router = RouterService(engine, model, expert_sets, vision, config.router, Outcomes())
        client = RouterClient(lambda: [sockets["router"]], PLAIN_CHANNELS)
        parts = GenerateParts(processor, client, lambda: description, gateway=config.gateway, limits=config.router)
        async with AsyncExitStack() as stack:
            engine.start()
            stack.callback(engine.stop)
            stack.push_async_callback(encoder.close)
            stack.push_async_callback(vision.close)
            stack.push_async_callback(client.close)
            stack.push_async_callback(parts.close)
            await parts.start()
            servicers: dict[str, tuple[Callable[[Any, grpc.aio.Server], None], object]] = {
                "vision": (vision_pb2_grpc.add_VisionEncoderServicer_to_server, VisionEncoderService(encoder)),
                "router": (router_pb2_grpc.add_RouterServicer_to_server, router),
                "gateway": (echovlm_pb2_grpc.add_EchoVLMServicer_to_server, GatewayService(parts)),
            }
            for name, (register, servicer) in servicers.items():
                await stack.enter_async_context(_listening(sockets[name], register, servicer))
            yield sockets["gateway"]


def _configuration(checkpoint: Path) -> Config:
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
