"""The router as a Ray Serve deployment."""

import asyncio
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from echovlm_ray.serving.cluster.endpoints import Endpoints
from echovlm_ray.serving.cluster.settings import (
    CONTROL,
    DEPLOYMENTS,
    EXPERT_DEPLOYMENT,
    VISION,
    RouterSettings,
    expert_application,
)
from echovlm_ray.serving.deploy.replica import Part, Replica, Service, arithmetic_of, device_of, dtype_of
from experts.transport.inner_channel import PLAIN_CHANNELS, InnerChannels
from protos import control_pb2, router_pb2, router_pb2_grpc

if TYPE_CHECKING:
    import torch

    from echovlm_ray.engine.engine import Engine
    from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
    from echovlm_ray.serving.cluster.metrics import RouterMetrics
    from echovlm_ray.serving.cluster.served import ServedCheckpoint
    from echovlm_ray.serving.lm.request import ServedModel
    from experts.bundles.bundle import Bundle
    from experts.registry.registry import Registry
    from router.dispatch.expert_call import ExpertPlacement
    from router.gating.expert_gates import BundleGates
    from router.gating.organ_gate import OrganGate
    from router.rollouts.traffic import TrafficPolicy

# At start, Control's policy is waited for so long; then what it last left in its file serves, and where there is none,
# the checkpoint's own experts.
FIRST_POLICY_S = 10.0
# When a router starts together with Control, it need not wait for it.
FIND_CONTROL_S = 0.5
# How long a policy waits for the address of a new organ's replica.
NEW_ORGAN_S = 3.0

SERVICE_NAME = router_pb2.DESCRIPTOR.services_by_name["Router"].full_name


class RouterReplica(Replica):
    """Serves `echovlm.v1.Router`: the backbone, the gates, the engine, and the way to the experts."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        """Takes the fields of `RouterSettings`."""
        import torch

        from echovlm_ray.serving.cluster.served import served_checkpoint
        from echovlm_ray.serving.lm.feed import RolloutFeedClient
        from echovlm_ray.serving.lm.outcomes import Outcomes
        from echovlm_ray.serving.lm.pinning import ExpertSets
        from echovlm_ray.serving.lm.service import RouterService
        from echovlm_ray.serving.vision.client import VisionClient

        parsed = RouterSettings.model_validate(settings)
        torch.set_num_threads(parsed.model.torch_threads)
        served = served_checkpoint(parsed.model)
        device = device_of(parsed)
        watched = {name: DEPLOYMENTS[name] for name in (VISION, CONTROL)}
        if parsed.router.experts == "remote":
            watched |= {expert_application(organ): EXPERT_DEPLOYMENT for organ in served.organs}
        endpoints = Endpoints(watched, parsed.system_id)
        endpoints.start()
        channels = self._channels_of(parsed)
        first = await asyncio.to_thread(_first_set, parsed, served, endpoints, channels)
        used: list[ExpertSets] = []

        def in_use() -> Collection[str]:
            return used[0].pins()[1] if used else {member.bundle_digest for member in first.expert_set.members}

        keeps = in_use if parsed.router.experts == "remote" else None
        engine, model, organ_gate = await asyncio.to_thread(
            build_engine, parsed, first, device, endpoints, keeps, channels
        )
        engine.start()
        vision = VisionClient(endpoints.source(VISION), channels)
        expert_sets = ExpertSets(
            engine.dispatcher,
            organ_gate,
            model.expert_set,
            model.gates,
            read=model.read_gates,
            forget=engine.evict_bundle,
            prepare=_find_new_organs(endpoints, served.organs),
            identity=parsed.identity,
        )
        used.append(expert_sets)
        outcomes = Outcomes()
        feed = RolloutFeedClient(endpoints.source(CONTROL), expert_sets, outcomes, channels)
        service = RouterService(engine, model, expert_sets, vision, parsed.router, outcomes, feed.replayed)
        part = Part(
            services=[Service(router_pb2_grpc.add_RouterServicer_to_server, service, SERVICE_NAME)],
            queue_length=lambda: service.queue_length,
            device=str(device),
            arithmetic=arithmetic_of(engine.dtype, device),
            healthy=lambda: engine.alive,
            problem=lambda: feed.problem,
            measure=lambda: _measure(outcomes.metrics, engine),
            closing=[vision.close, engine.stop, feed.stop, endpoints.stop],
        )
        # Before the first request: what Control took out of service meanwhile is not resident anywhere.
        await feed.start(FIRST_POLICY_S, lambda: _last_known(parsed, served))
        await self._start(parsed, part)


def build_engine(
    settings: RouterSettings,
    served: "ServedCheckpoint",
    device: "torch.device",
    endpoints: Endpoints,
    in_use: "Callable[[], Collection[str]] | None" = None,
    channels: InnerChannels = PLAIN_CHANNELS,
) -> "tuple[Engine, ServedModel, OrganGate]":
    """Loads the backbone and the gates, and puts the engine together; takes as long as reading the weights.

    Args:
        settings: the configuration.
        served: the checkpoint, with the set with which serving starts.
        device: where the backbone goes.
        endpoints: where the experts are.
        in_use: the digests whose copies must stay on this machine; None reads the registry alone and copies nothing.
        channels: connects to the experts.
    """
    from echovlm_ray.engine.engine import Engine
    from echovlm_ray.engine.runner import ModelRunner
    from echovlm_ray.model.checkpoint import load_backbone
    from echovlm_ray.model.packing import warm_up
    from echovlm_ray.serving.control.bundles import open_kept, open_registry
    from echovlm_ray.serving.lm.request import ServedModel
    from router.dispatch.dispatcher import Dispatcher
    from router.gating.expert_gates import ExpertGates
    from router.gating.organ_gate import OrganGate

    backbone = load_backbone(served.directory, dtype=dtype_of(settings), device=device)
    config = backbone.config
    registry = open_registry(settings.experts, served.directory)
    open_bundle = registry.open if in_use is None else open_kept(settings.experts, served.directory, in_use).open_gates
    read_gates = _gate_reader(open_bundle, config.text_config.num_hidden_layers, backbone.dtype, device)
    expert_set = served.expert_set
    gates = {member.bundle_digest: read_gates(member.bundle_digest) for member in expert_set.members}
    top_k = config.text_config.num_experts_per_tok
    dispatcher = Dispatcher(
        _placement(settings, served, registry, device, backbone.dtype, top_k, endpoints, channels),
        top_k=top_k,
        norm_topk_prob=config.text_config.norm_topk_prob,
    )
    token_gates = ExpertGates.of(expert_set, gates)
    token_gates.warm_up()
    dispatcher.add_set(token_gates)
    limits = settings.router
    runner = ModelRunner(
        backbone, dispatcher, kv_cache_tokens=limits.kv_cache_tokens, micro_batches=limits.micro_batches
    )
    warm_up(backbone, limits.max_batch_size)
    engine = Engine(
        runner,
        max_batch_size=limits.max_batch_size,
        max_queue=limits.max_queue,
        max_prefill_tokens=limits.max_prefill_tokens,
        max_request_s=limits.max_request_s,
        prefix_reuse=limits.prefix_reuse,
    )
    organ_gate = OrganGate(
        [each.profile for each in gates.values()],
        default_organ=settings.model.default_organ,
        max_organs=settings.model.max_organs_per_request,
    )
    return engine, ServedModel(config, expert_set, gates, read_gates, _end_tokens(backbone, served)), organ_gate


def _measure(metrics: "RouterMetrics", engine: "Engine") -> None:
    metrics.prefix_hits(engine.prefix_hits)
    metrics.preemptions(engine.preemptions)
    metrics.cache_blocks(total=engine.num_blocks, free=engine.free_blocks, kept=engine.cached_blocks)


def _gate_reader(
    open_bundle: "Callable[[str], Bundle]", num_layers: int, dtype: "torch.dtype", device: "torch.device"
) -> "Callable[[str], BundleGates]":
    from router.gating.expert_gates import BundleGates

    def read(digest: str) -> BundleGates:
        return BundleGates.read(open_bundle(digest), num_layers=num_layers, dtype=dtype, device=device)

    return read


def _placement(
    settings: RouterSettings,
    served: "ServedCheckpoint",
    registry: "Registry",
    device: "torch.device",
    dtype: "torch.dtype",
    top_k: int,
    endpoints: Endpoints,
    channels: InnerChannels,
) -> "ExpertPlacement":
    from echovlm_ray.serving.control.bundles import signature_policy
    from experts.group import ExpertGroup
    from experts.kernels.registry import get_kernel
    from router.dispatch.local import LocalExperts
    from router.dispatch.remote import RemoteExperts

    if settings.router.experts == "remote":
        return RemoteExperts(
            lambda organ: endpoints.of(expert_application(organ)),
            exchange_timeout_s=settings.router.exchange_timeout_s,
            channels=channels,
            shared_memory_bytes=settings.router.shared_memory_bytes,
        )

    groups = {}
    for member in served.expert_set.members:
        group = groups[member.organ] = ExpertGroup(
            member.organ,
            registry,
            get_kernel(settings.experts.kernel),
            device=device,
            dtype=dtype,
            other_dtype=settings.experts.other_dtype,
            top_k=top_k,
            max_resident_bytes=settings.experts.max_resident_bytes,
            backbone_digest=served.expert_set.backbone_digest,
            admit=signature_policy(settings.experts).admit,
        )
        group.load(member.bundle_digest)
    return LocalExperts(groups)


def _first_set(
    settings: RouterSettings, served: "ServedCheckpoint", endpoints: Endpoints, channels: InnerChannels
) -> "ServedCheckpoint":
    """The checkpoint with the set that Control says is live, if it says so now or has left it in its file.

    What the checkpoint came with may be gone from its registry, and is then not what a router must have to start.
    """
    from echovlm_ray.serving.cluster.known_policy import ask_policy
    from echovlm_ray.serving.lm.feed import policy_from_proto

    if settings.policy_file is None:
        return served
    endpoints.wait_for([CONTROL], FIND_CONTROL_S)
    asked = ask_policy(endpoints.of(CONTROL), channels)
    policy = asked if asked is not None and _is_ours(asked, served) else _last_known(settings, served)
    return served if policy is None else replace(served, expert_set=policy_from_proto(policy).stable)


def _last_known(settings: RouterSettings, served: "ServedCheckpoint") -> control_pb2.TrafficPolicy | None:
    """What Control last said, if it was said of this checkpoint.

    Raises:
        ForeignPolicyError: it was another deployment's Control.
    """
    from echovlm_ray.serving.cluster.known_policy import check_identity, read_policy

    policy = read_policy(settings.policy_file) if settings.policy_file is not None else None
    if policy is not None:
        check_identity(policy, settings.identity, str(settings.policy_file))
    return policy if policy is not None and _is_ours(policy, served) else None


def _is_ours(policy: control_pb2.TrafficPolicy, served: "ServedCheckpoint") -> bool:
    own = served.expert_set
    return (policy.stable.backbone_digest, policy.stable.routing) == (own.backbone_digest, own.routing)


def _find_new_organs(endpoints: Endpoints, organs: tuple[str, ...]) -> "Callable[[TrafficPolicy], None]":
    """What has the replicas of organs watched that a policy is the first to name."""
    known = set(organs)

    def find(policy: "TrafficPolicy") -> None:
        new = {expert_application(organ): EXPERT_DEPLOYMENT for organ in policy.organs if organ not in known}
        if new:
            endpoints.watch(new)
            endpoints.wait_for(new, NEW_ORGAN_S)
            known.update(policy.organs)

    return find


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
