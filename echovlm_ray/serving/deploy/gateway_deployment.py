"""The gateway as a Ray Serve deployment."""

import asyncio
from typing import TYPE_CHECKING, Any

from echovlm_ray.serving.cluster.endpoints import Endpoints
from echovlm_ray.serving.cluster.metrics import DecodingMetrics
from echovlm_ray.serving.cluster.settings import (
    CONTROL,
    EXPERT_DEPLOYMENT,
    ROUTER,
    VISION,
    GatewaySettings,
    deployments_of,
    expert_application,
)
from echovlm_ray.serving.deploy.replica import Part, Replica, Service
from protos import echovlm_pb2, echovlm_pb2_grpc

if TYPE_CHECKING:
    from echovlm_ray.serving.cluster.live_model import LiveModel
    from echovlm_ray.serving.cluster.served import ServedCheckpoint
    from echovlm_ray.serving.core.description import ModelDescription
    from echovlm_ray.serving.grpc.health import Addresses, HealthMonitor
    from echovlm_ray.vision.decoding.pool import DecoderPool
    from experts.registry.kept_bundles import KeptBundles
    from experts.transport.inner_channel import InnerChannels

SERVICE_NAME = echovlm_pb2.DESCRIPTOR.services_by_name["EchoVLM"].full_name


class GatewayReplica(Replica):
    """Serves `echovlm.v1.EchoVLM` to clients, and the health of all parts."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        """Takes the fields of `GatewaySettings`."""
        from echovlm_ray.model.processing import EchoVLMProcessor
        from echovlm_ray.serving.cluster.live_model import LiveModel
        from echovlm_ray.serving.cluster.served import served_checkpoint
        from echovlm_ray.serving.control.bundles import open_kept
        from echovlm_ray.serving.core.parts import GenerateParts
        from echovlm_ray.serving.grpc.gateway import GatewayService, server_options
        from echovlm_ray.serving.lm.router_client import RouterClient

        parsed = GatewaySettings.model_validate(settings)
        section = parsed.gateway
        served = served_checkpoint(parsed.model)
        channels = self._channels_of(parsed)
        endpoints = Endpoints(deployments_of(served.organs), parsed.system_id)
        endpoints.start()
        processor = None
        if not served.missing_text_files:
            processor = await asyncio.to_thread(EchoVLMProcessor.from_pretrained, served.directory)
        bundles = await asyncio.to_thread(open_kept, parsed.experts, served.directory)
        description = await asyncio.to_thread(_describe, parsed, served, bundles)
        live = LiveModel(endpoints.source(CONTROL), description, bundles.manifest, channels, parsed.identity)
        router = RouterClient(endpoints.source(ROUTER), channels)
        shared = GenerateParts(processor, router, live.describe, gateway=section, limits=parsed.router)
        await shared.start()
        public = server_options(section, parsed.router)
        monitor = _monitor(self, parsed, served, endpoints, live, channels)
        decoding = DecodingMetrics()
        part = Part(
            services=[],
            queue_length=lambda: shared.queue_length,
            measure=lambda: _measure(decoding, shared.decoders),
            closing=[monitor.stop, live.stop, router.close, shared.close, endpoints.stop],
        )
        service = GatewayService(shared)
        clients = Service(echovlm_pb2_grpc.add_EchoVLMServicer_to_server, service, SERVICE_NAME, service.admit)
        await self._start(parsed, part, public, [clients])
        await live.start()
        endpoints.on_change(monitor.wake)
        await monitor.start()


def _measure(metrics: DecodingMetrics, decoders: "DecoderPool | None") -> None:
    if decoders is not None:
        metrics.update(decoders.queue_length, decoders.outcomes)


def _monitor(
    replica: GatewayReplica,
    settings: GatewaySettings,
    served: "ServedCheckpoint",
    endpoints: Endpoints,
    live: "LiveModel",
    channels: "InnerChannels",
) -> "HealthMonitor":
    from echovlm_ray.serving.grpc import health

    parts = {
        health.ROUTER: endpoints.source(ROUTER),
        health.VISION: endpoints.source(VISION),
        health.CONTROL: endpoints.source(CONTROL),
    }

    def organs() -> "dict[str, Addresses]":
        names = [described.organ for described in live.describe().organs]
        if settings.router.experts != "remote":
            # Experts in the router's own process live and die with it.
            return {health.organ_service(name): endpoints.source(ROUTER) for name in names}
        endpoints.watch({expert_application(name): EXPERT_DEPLOYMENT for name in names})
        return {health.organ_service(name): endpoints.source(expert_application(name)) for name in names}

    return health.HealthMonitor(
        parts,
        replica.publish_health,
        all_organs_needed=served.expert_set.routing == "flat",
        speaks_text=not served.missing_text_files,
        live_parts=organs,
        experts_apart=settings.router.experts == "remote",
        channels=channels,
    )


def _describe(settings: GatewaySettings, served: "ServedCheckpoint", bundles: "KeptBundles") -> "ModelDescription":
    from echovlm_ray.checkpoint import demo
    from echovlm_ray.serving.cluster.live_model import describe_organ
    from echovlm_ray.serving.core.description import ModelDescription

    index, expert_set = served.index, served.expert_set
    organs = [describe_organ(member.organ, member.bundle_digest, bundles.manifest) for member in expert_set.members]
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
