"""The gateway as a Ray Serve deployment."""

import asyncio
from typing import TYPE_CHECKING, Any

from echovlm_ray.serving.deployments.replica import Part, Replica, Service
from echovlm_ray.serving.deployments.settings import (
    CONTROL,
    ROUTER,
    VISION,
    GatewaySettings,
    deployments_of,
    expert_application,
)
from echovlm_ray.serving.endpoints import Endpoints
from echovlm_ray.serving.server import INTERNAL_CHANNEL_OPTIONS, MESSAGE_SLACK_BYTES, ServerOptions
from protos import echovlm_pb2, echovlm_pb2_grpc

if TYPE_CHECKING:
    from echovlm_ray.serving.gateway import ModelDescription
    from echovlm_ray.serving.health import HealthMonitor
    from echovlm_ray.serving.served import ServedCheckpoint

SERVICE_NAME = echovlm_pb2.DESCRIPTOR.services_by_name["EchoVLM"].full_name


class GatewayReplica(Replica):
    """Serves `echovlm.v1.EchoVLM` to clients, and the health of all parts."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        """Takes the fields of `GatewaySettings`."""
        from echovlm_ray.model.processing import EchoVLMProcessor
        from echovlm_ray.serving.gateway import GatewayService
        from echovlm_ray.serving.router_client import RouterClient
        from echovlm_ray.serving.served import served_checkpoint

        parsed = GatewaySettings.model_validate(settings)
        section = parsed.gateway
        served = served_checkpoint(parsed.model)
        endpoints = Endpoints(deployments_of(served.organs))
        endpoints.start()
        processor = None
        if not served.missing_text_files:
            processor = await asyncio.to_thread(EchoVLMProcessor.from_pretrained, served.directory)
        description = await asyncio.to_thread(_describe, parsed, served)
        router = RouterClient(endpoints.source(ROUTER), INTERNAL_CHANNEL_OPTIONS)
        service = GatewayService(processor, router, lambda: description, gateway=section, limits=parsed.router)
        public = ServerOptions(
            section.host,
            section.port,
            section.tls,
            section.token_file,
            max_receive_bytes=section.max_images * section.max_image_bytes + MESSAGE_SLACK_BYTES,
        )
        monitor = _monitor(self, parsed, served, endpoints)
        part = Part(
            services=[],
            queue_length=lambda: service.queue_length,
            closing=[monitor.stop, router.close, service.close, endpoints.stop],
        )
        clients = Service(echovlm_pb2_grpc.add_EchoVLMServicer_to_server, service, SERVICE_NAME)
        await self._start(parsed, part, public, [clients])
        endpoints.on_change(monitor.wake)
        await monitor.start()


def _monitor(
    replica: GatewayReplica, settings: GatewaySettings, served: "ServedCheckpoint", endpoints: Endpoints
) -> "HealthMonitor":
    from echovlm_ray.serving import health

    parts = {
        health.ROUTER: endpoints.source(ROUTER),
        health.VISION: endpoints.source(VISION),
        health.CONTROL: endpoints.source(CONTROL),
    }
    for organ in served.organs:
        # Experts in the router's own process live and die with it.
        application = expert_application(organ) if settings.router.experts == "remote" else ROUTER
        parts[health.organ_service(organ)] = endpoints.source(application)
    return health.HealthMonitor(
        parts,
        replica.publish_health,
        all_organs_needed=served.expert_set.routing == "flat",
        speaks_text=not served.missing_text_files,
    )


def _describe(settings: GatewaySettings, served: "ServedCheckpoint") -> "ModelDescription":
    from echovlm_ray.checkpoint import demo
    from echovlm_ray.checkpoint.layout import registry_root
    from echovlm_ray.serving.gateway import ModelDescription, OrganDescription
    from experts.registry import Registry

    index, expert_set = served.index, served.expert_set
    registry = Registry(registry_root(served.directory))
    organs = []
    for member in expert_set.members:
        manifest = registry.open(member.bundle_digest).manifest
        organs.append(OrganDescription(manifest.organ, manifest.version, member.bundle_digest, manifest.num_experts))
    return ModelDescription(
        name=index.name,
        version=index.version,
        description=index.description,
        backbone_digest=index.backbone_digest,
        expert_set_id=expert_set.id,
        organs=tuple(organs),
        default_organ=settings.model.default_organ,
        notices=(index.description,) if index.name == demo.NAME else (),
    )
