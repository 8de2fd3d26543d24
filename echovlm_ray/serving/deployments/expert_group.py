"""The expert group of one organ as a Ray Serve deployment."""

import asyncio
from typing import Any

from echovlm_ray.serving.deployments.replica import Part, Replica, Service, device_of, dtype_of
from echovlm_ray.serving.deployments.settings import ExpertGroupSettings
from echovlm_ray.serving.errors import to_status
from protos import expert_pb2, expert_pb2_grpc

SERVICE_NAME = expert_pb2.DESCRIPTOR.services_by_name["ExpertGroup"].full_name


class ExpertGroupReplica(Replica):
    """Loads its organ's bundle of the live set, then serves `echovlm.v1.ExpertGroup`."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        """Takes the fields of `ExpertGroupSettings`."""
        import torch

        from echovlm_ray.checkpoint.layout import registry_root
        from echovlm_ray.serving.served import served_checkpoint
        from experts.group import ExpertGroup
        from experts.kernels.registry import get_kernel
        from experts.registry import Registry
        from experts.service import ExpertGroupService

        parsed = ExpertGroupSettings.model_validate(settings)
        torch.set_num_threads(parsed.model.torch_threads)
        served = served_checkpoint(parsed.model)
        device = device_of(parsed)
        group = ExpertGroup(
            parsed.organ,
            Registry(registry_root(served.directory)),
            get_kernel(parsed.experts.kernel),
            device=device,
            dtype=dtype_of(parsed),
            max_resident_bytes=parsed.experts.max_resident_bytes,
            backbone_digest=served.expert_set.backbone_digest,
        )
        await asyncio.to_thread(group.load, served.expert_set.bundle_digest(parsed.organ))
        service = ExpertGroupService(group, to_status=to_status, max_queue=parsed.experts.max_queue)

        part = Part(
            services=[Service(expert_pb2_grpc.add_ExpertGroupServicer_to_server, service, SERVICE_NAME)],
            queue_length=lambda: service.exchanges_in_flight,
            device=str(device),
            organ=parsed.organ,
            bundles=service.resident_bundles,
            work_done=lambda: service.exchanges_received,
            pending=lambda: service.exchanges_in_flight > 0,
            closing=[service.close],
        )
        await self._start(parsed, part)
