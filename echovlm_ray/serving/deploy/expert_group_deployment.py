"""The expert group of one organ as a Ray Serve deployment."""

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from echovlm_ray.serving.cluster.endpoints import Endpoints, addresses_now
from echovlm_ray.serving.cluster.known_policy import ask_policy, check_identity, read_policy
from echovlm_ray.serving.cluster.settings import CONTROL, DEPLOYMENTS, ExpertGroupSettings
from echovlm_ray.serving.deploy.replica import Part, Replica, Service, arithmetic_of, device_of
from echovlm_ray.serving.grpc.errors import to_status
from protos import expert_pb2

if TYPE_CHECKING:
    from echovlm_ray.serving.cluster.served import ServedCheckpoint
    from experts.group import ExpertGroup
    from experts.transport.inner_channel import InnerChannels
    from protos import control_pb2

logger = logging.getLogger(__name__)

SERVICE_NAME = expert_pb2.DESCRIPTOR.services_by_name["ExpertGroup"].full_name
# Python's own is 0.005: so long an exchange would wait for every step of a load in another thread, layer after layer.
SWITCH_INTERVAL_S = 0.0005
# Those that compute products of packed weights; another says by its name what computes.
_PACKED_KERNELS = ("auto", "cpu_packed")
# A replica that starts together with Control need not wait for it.
FIND_CONTROL_S = 0.5


class ExpertGroupReplica(Replica):
    """Loads what is to be served of its organ, then serves `echovlm.v1.ExpertGroup`."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        """Takes the fields of `ExpertGroupSettings`."""
        import torch

        from echovlm_ray.serving.cluster.organ_health import OrganHealth, OrganPolicy
        from echovlm_ray.serving.cluster.served import expert_exchange, served_checkpoint
        from echovlm_ray.serving.control.bundles import open_kept, signature_policy
        from experts.group import ExpertGroup
        from experts.kernels.registry import get_kernel
        from experts.service import ExpertGroupService, add_expert_group_to_server

        parsed = ExpertGroupSettings.model_validate(settings)
        device = device_of(parsed)
        if device.type == "cpu":
            # Before any thread that computes is started: on Linux it holds for this one and for those that it starts.
            # With a GPU this process only hands work on, and doing that late would leave the GPU idle.
            os.nice(parsed.experts.niceness)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        torch.set_num_threads(parsed.model.torch_threads)
        served = served_checkpoint(parsed.model)
        exchange = expert_exchange(parsed.model)
        channels = self._channels_of(parsed)
        policy = OrganPolicy(parsed.organ, await asyncio.to_thread(_policy, parsed, served, channels))

        def in_use() -> set[str]:
            return {*policy.wanted, *(resident.digest for resident in group.resident())}

        group = ExpertGroup(
            parsed.organ,
            open_kept(parsed.experts, served.directory, in_use),
            get_kernel(parsed.experts.kernel),
            device=device,
            dtype=exchange.dtype,
            other_dtype=parsed.experts.other_dtype,
            top_k=exchange.top_k,
            max_resident_bytes=parsed.experts.max_resident_bytes,
            backbone_digest=served.expert_set.backbone_digest,
            admit=signature_policy(parsed.experts).admit,
        )
        await asyncio.to_thread(_load, group, policy.wanted, served)
        endpoints = Endpoints({CONTROL: DEPLOYMENTS[CONTROL]}, parsed.system_id)
        endpoints.start()
        health = OrganHealth(group, endpoints.source(CONTROL), self.publish_health, policy, channels, parsed.identity)
        service = ExpertGroupService(
            group, to_status=to_status, max_queue=parsed.experts.max_queue, secret=channels.secret
        )

        part = Part(
            services=[Service(add_expert_group_to_server, service, SERVICE_NAME)],
            queue_length=lambda: service.exchanges_in_flight,
            device=str(device),
            arithmetic=arithmetic_of(exchange.dtype, device) if parsed.experts.kernel in _PACKED_KERNELS else "",
            organ=parsed.organ,
            bundles=service.resident_bundles,
            work_done=lambda: service.exchanges_received,
            pending=lambda: service.exchanges_in_flight > 0,
            problem=health.problem,
            closing=[health.stop, endpoints.stop, service.close],
        )
        await self._start(parsed, part)
        await health.start()


def _policy(
    settings: ExpertGroupSettings, served: "ServedCheckpoint", channels: "InnerChannels"
) -> "control_pb2.TrafficPolicy | None":
    """What Control says, or what it last said, of this checkpoint; None where it never said anything.

    Raises:
        ForeignPolicyError: it is another deployment's.
    """
    control = addresses_now(settings.system_id.application(CONTROL), DEPLOYMENTS[CONTROL], FIND_CONTROL_S)
    policy = ask_policy(control, channels) or read_policy(settings.policy_file)
    if policy is not None:
        check_identity(policy, settings.identity, f"Control or {settings.policy_file}")
    ours = policy is not None and policy.stable.backbone_digest == served.expert_set.backbone_digest
    return policy if ours else None


def _load(group: "ExpertGroup", wanted: Sequence[str], served: "ServedCheckpoint") -> None:
    """Loads what requests may get; where nothing is known of that, what the checkpoint came with."""
    own = [served.expert_set.bundle_digest(group.organ)] if group.organ in served.organs else []
    for digest in wanted or own:
        try:
            group.load(digest)
        except Exception as error:
            # What was left on the disk may be outdated. Control sees what is missing here, tries again, and judges.
            logger.warning("%s… of %s is not loaded at the start: %s", digest[:12], group.organ, error)
