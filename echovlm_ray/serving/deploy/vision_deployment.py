"""The vision encoder as a Ray Serve deployment."""

import asyncio
from typing import Any

from echovlm_ray.serving.cluster.settings import VisionSettings
from echovlm_ray.serving.deploy.replica import Part, Replica, Service, arithmetic_of, device_of, dtype_of
from protos import vision_pb2, vision_pb2_grpc

SERVICE_NAME = vision_pb2.DESCRIPTOR.services_by_name["VisionEncoder"].full_name


class VisionReplica(Replica):
    """Serves `echovlm.v1.VisionEncoder`."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        """Takes the fields of `VisionSettings`."""
        import torch

        from echovlm_ray.engine.vision_encoder import VisionEncoder, encoder_digest
        from echovlm_ray.model.checkpoint import load_vision_tower
        from echovlm_ray.serving.cluster.served import served_checkpoint
        from echovlm_ray.serving.vision.service import VisionEncoderService

        parsed = VisionSettings.model_validate(settings)
        torch.set_num_threads(parsed.model.torch_threads)
        served = served_checkpoint(parsed.model)
        device = device_of(parsed)
        tower = await asyncio.to_thread(load_vision_tower, served.directory, dtype=dtype_of(parsed), device=device)
        dtype = next(tower.parameters()).dtype
        encoder = VisionEncoder(
            tower,
            encoder_digest(served.index.backbone_digest, dtype),
            cache_bytes=parsed.vision.cache_bytes,
            max_batch_patches=parsed.vision.max_batch_patches,
            max_queue=parsed.vision.max_queue,
        )
        service = VisionEncoderService(encoder)
        part = Part(
            services=[Service(vision_pb2_grpc.add_VisionEncoderServicer_to_server, service, SERVICE_NAME)],
            queue_length=lambda: service.queue_length,
            device=str(device),
            arithmetic=arithmetic_of(dtype, device),
            closing=[encoder.close],
        )
        await self._start(parsed, part)
