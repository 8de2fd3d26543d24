"""A gateway over a real router, engine, experts and vision encoder on the demo checkpoint, without Ray."""

import dataclasses
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from safetensors.torch import load_file

from echovlm_ray.checkpoint.layout import CheckpointIndex, backbone_directory, read_index, registry_root
from echovlm_ray.config import GatewaySection, RouterSection
from echovlm_ray.engine.vision_encoder import VisionEncoder, encoder_digest
from echovlm_ray.model.checkpoint import load_vision_tower
from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.serving.core.description import ModelDescription, OrganDescription
from echovlm_ray.serving.core.parts import GenerateParts
from echovlm_ray.serving.grpc.gateway import GatewayService, server_options
from echovlm_ray.serving.grpc.interceptor import Admit
from echovlm_ray.serving.grpc.server import GrpcServer, ServerOptions
from echovlm_ray.serving.lm.router_client import RouterClient
from echovlm_ray.serving.vision.client import VisionClient
from echovlm_ray.serving.vision.service import VisionEncoderService
from experts.transport.inner_channel import PLAIN_CHANNELS
from protos import echovlm_pb2_grpc, router_pb2, router_pb2_grpc, vision_pb2_grpc
from tests.engines import local_experts, running_engine
from tests.serving.router_system import router_parts
from tests.split_golden import SplitGolden


@dataclass
class GatewaySystem:
    """What a test speaks to, and looks into."""

    stub: Any
    service: GenerateParts
    processor: EchoVLMProcessor | None
    address: str


def description(index: CheckpointIndex) -> ModelDescription:
    return ModelDescription(
        name=index.name,
        version=index.version,
        description=index.description,
        backbone_digest=index.backbone_digest,
        expert_set_id=index.expert_set().id,
        organs=tuple(OrganDescription(entry.organ, entry.version, entry.bundle_digest, 4) for entry in index.organs),
        default_organ="breast",
        notices=("The demo's text means nothing.",),
    )


@asynccontextmanager
async def served(
    register: Any, servicer: object, name: str, admit: Admit | None = None, options: ServerOptions | None = None
) -> AsyncIterator[str]:
    server = GrpcServer(options or ServerOptions())
    server.add(register, servicer, name, admit)
    await server.start()
    try:
        yield server.address
    finally:
        await server.stop(0)


@asynccontextmanager
async def gateway(
    checkpoint: Path,
    processor: EchoVLMProcessor | None,
    routers: Sequence[str],
    section: GatewaySection,
    limits: RouterSection,
) -> AsyncIterator[GatewaySystem]:
    """A gateway in front of given routers."""
    model = description(read_index(checkpoint))
    client = RouterClient(lambda: routers)
    parts = GenerateParts(processor, client, lambda: model, gateway=section, limits=limits)
    service = GatewayService(parts)
    await parts.start()
    async with (
        served(
            echovlm_pb2_grpc.add_EchoVLMServicer_to_server,
            service,
            "echovlm.v1.EchoVLM",
            service.admit,
            dataclasses.replace(server_options(section, limits), port=0),
        ) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield GatewaySystem(echovlm_pb2_grpc.EchoVLMStub(channel), parts, processor, address)
    await client.close()
    await parts.close()


@asynccontextmanager
async def whole_system(
    checkpoint: Path, processor: EchoVLMProcessor, section: GatewaySection, limits: RouterSection
) -> AsyncIterator[GatewaySystem]:
    """All parts, each behind its own server."""
    index = read_index(checkpoint)
    backbone = backbone_directory(checkpoint)
    split = SplitGolden(
        backbone=backbone,
        registry=registry_root(checkpoint),
        expert_set=index.expert_set(),
        tensors=load_file(backbone / "model.safetensors"),
        config=json.loads((backbone / "config.json").read_text()),
    )
    tower = load_vision_tower(checkpoint)
    encoder = VisionEncoder(
        tower,
        encoder_digest(index.backbone_digest, tower.dtype),
        cache_bytes=10**7,
        max_batch_patches=16_384,
        max_queue=16,
    )
    end_token_ids = frozenset([processor.tokenizer.get_vocab()["<|im_end|>"]])
    register_vision = vision_pb2_grpc.add_VisionEncoderServicer_to_server
    register_router = router_pb2_grpc.add_RouterServicer_to_server
    with running_engine(split, local_experts(split), kv_cache_tokens=8192, max_prefill_tokens=2048) as engine:
        async with served(register_vision, VisionEncoderService(encoder), "echovlm.v1.VisionEncoder") as address:
            vision = VisionClient(lambda: [address], PLAIN_CHANNELS)
            router = router_parts(engine, split, vision, limits, end_token_ids=end_token_ids).service
            async with (
                served(register_router, router, "echovlm.v1.Router") as router_address,
                gateway(checkpoint, processor, [router_address], section, limits) as system,
            ):
                yield system
            await vision.close()
    await encoder.close()


class ScriptedRouter(router_pb2_grpc.RouterServicer):
    """Plays a list of messages, for what a real model cannot be made to say; an exception in it is raised."""

    def __init__(self, script: Sequence[router_pb2.RouterGenerateResponse | Exception]) -> None:
        self.script = script
        self.requests: list[router_pb2.RouterGenerateRequest] = []
        self.ended_early = 0

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[router_pb2.RouterGenerateResponse]:
        self.requests.append(request)
        done = False
        try:
            for message in self.script:
                if isinstance(message, Exception):
                    done = True
                    raise message
                yield message
            done = True
        finally:
            self.ended_early += not done
