"""The router as a Ray Serve deployment."""

import asyncio
from typing import TYPE_CHECKING, Any

from echovlm_ray.serving.deployments.replica import Part, Replica, Service, device_of, dtype_of
from echovlm_ray.serving.deployments.settings import (
    DEPLOYMENTS,
    EXPERT_DEPLOYMENT,
    VISION,
    RouterSettings,
    expert_application,
)
from echovlm_ray.serving.endpoints import Endpoints
from echovlm_ray.serving.server import INTERNAL_CHANNEL_OPTIONS
from protos import router_pb2, router_pb2_grpc

if TYPE_CHECKING:
    import torch

    from echovlm_ray.engine.engine import Engine
    from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
    from echovlm_ray.serving.router import ServedModel
    from echovlm_ray.serving.served import ServedCheckpoint
    from experts.bundle import Bundle
    from router.exchange import ExpertPlacement
    from router.organ_gate import OrganGate

SERVICE_NAME = router_pb2.DESCRIPTOR.services_by_name["Router"].full_name


class RouterReplica(Replica):
    """Serves `echovlm.v1.Router`: the backbone, the gates, the engine, and the way to the experts."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        """Takes the fields of `RouterSettings`."""
        import torch

        from echovlm_ray.serving.router import RouterService
        from echovlm_ray.serving.served import served_checkpoint
        from echovlm_ray.serving.vision_client import VisionClient

        parsed = RouterSettings.model_validate(settings)
        torch.set_num_threads(parsed.model.torch_threads)
        served = served_checkpoint(parsed.model)
        device = device_of(parsed)
        watched = {VISION: DEPLOYMENTS[VISION]}
        if parsed.router.experts == "remote":
            watched |= {expert_application(organ): EXPERT_DEPLOYMENT for organ in served.organs}
        endpoints = Endpoints(watched)
        endpoints.start()
        engine, model, organ_gate = await asyncio.to_thread(_build, parsed, served, device, endpoints)
        engine.start()
        vision = VisionClient(endpoints.source(VISION), INTERNAL_CHANNEL_OPTIONS)
        service = RouterService(engine, model, organ_gate, vision, parsed.router)
        part = Part(
            services=[Service(router_pb2_grpc.add_RouterServicer_to_server, service, SERVICE_NAME)],
            queue_length=lambda: service.queue_length,
            device=str(device),
            healthy=lambda: engine.alive,
            closing=[vision.close, engine.stop, endpoints.stop],
        )
        await self._start(parsed, part)


def _build(
    settings: RouterSettings, served: "ServedCheckpoint", device: "torch.device", endpoints: Endpoints
) -> "tuple[Engine, ServedModel, OrganGate]":
    """Loads the backbone and the gates, and puts the engine together; takes as long as reading the weights."""
    from echovlm_ray.checkpoint.layout import registry_root
    from echovlm_ray.engine.engine import Engine
    from echovlm_ray.engine.runner import ModelRunner
    from echovlm_ray.model.checkpoint import load_backbone
    from echovlm_ray.serving.router import ServedModel
    from experts.registry import Registry
    from router.dispatch import Dispatcher
    from router.expert_gates import ExpertGates
    from router.organ_gate import OrganGate

    backbone = load_backbone(served.directory, dtype=dtype_of(settings), device=device)
    config = backbone.config
    expert_set = served.expert_set
    registry = Registry(registry_root(served.directory))
    bundles = {member.bundle_digest: registry.open(member.bundle_digest) for member in expert_set.members}
    dispatcher = Dispatcher(
        _placement(settings, served, registry, device, backbone.dtype, endpoints),
        top_k=config.text_config.num_experts_per_tok,
        norm_topk_prob=config.text_config.norm_topk_prob,
    )
    dispatcher.add_set(
        ExpertGates.from_bundles(
            expert_set,
            bundles,
            num_layers=config.text_config.num_hidden_layers,
            dtype=backbone.dtype,
            device=device,
        )
    )
    limits = settings.router
    engine = Engine(
        ModelRunner(backbone, dispatcher, kv_cache_tokens=limits.kv_cache_tokens),
        max_batch_size=limits.max_batch_size,
        max_queue=limits.max_queue,
        max_prefill_tokens=limits.max_prefill_tokens,
        max_request_s=limits.max_request_s,
    )
    model = ServedModel(config, expert_set, served.versions, _end_tokens(backbone, served))
    profiles = [_profile(bundle) for bundle in bundles.values()]
    return (
        engine,
        model,
        OrganGate(
            profiles, default_organ=settings.model.default_organ, max_organs=settings.model.max_organs_per_request
        ),
    )


def _placement(
    settings: RouterSettings,
    served: "ServedCheckpoint",
    registry: Any,
    device: "torch.device",
    dtype: "torch.dtype",
    endpoints: Endpoints,
) -> "ExpertPlacement":
    from experts.group import ExpertGroup
    from experts.kernels.registry import get_kernel
    from router.local import LocalExperts
    from router.remote import RemoteExperts

    if settings.router.experts == "remote":
        return RemoteExperts(
            lambda organ: endpoints.of(expert_application(organ)),
            exchange_timeout_s=settings.router.exchange_timeout_s,
        )
    groups = {}
    for member in served.expert_set.members:
        group = groups[member.organ] = ExpertGroup(
            member.organ,
            registry,
            get_kernel(settings.experts.kernel),
            device=device,
            dtype=dtype,
            max_resident_bytes=settings.experts.max_resident_bytes,
            backbone_digest=served.expert_set.backbone_digest,
        )
        group.load(member.bundle_digest)
    return LocalExperts(groups)


def _profile(bundle: "Bundle") -> Any:
    from router.organ_gate import OrganProfile

    manifest = bundle.manifest
    return OrganProfile(manifest.organ, manifest.organ_synonyms, bundle.prototype())


def _end_tokens(model: "EchoVLMForConditionalGeneration", served: "ServedCheckpoint") -> frozenset[int]:
    """The tokens at which the model ends: its generation config's, or its config's."""
    from transformers import GenerationConfig

    from echovlm_ray.checkpoint.layout import backbone_directory

    folder = backbone_directory(served.directory)
    tokens = None
    if (folder / "generation_config.json").is_file():
        tokens = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    if tokens is None:
        tokens = model.config.text_config.eos_token_id
    if tokens is None:
        raise ValueError(f"{folder} names no eos_token_id, so no answer would ever end: add it to its config.json")
    return frozenset([tokens] if isinstance(tokens, int) else tokens)
