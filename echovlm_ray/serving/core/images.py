"""Converts image files to patches: decoding runs in other processes, splitting on threads."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from echovlm_ray.config import GatewaySection
from echovlm_ray.fair_queue import FairThreads
from echovlm_ray.model.picture_patches import VisionPatches
from echovlm_ray.model.request_processor import RequestProcessor
from echovlm_ray.vision.decoding.pool import DecoderPool
from echovlm_ray.vision.decoding.settings import DecoderSettings
from echovlm_ray.vision.images import DecodedImage, ImageLimits
from protos import tensor_pb2, vision_pb2


@dataclass(frozen=True, slots=True, eq=False)
class LoadedImage:
    """A decoded image, split into patches.

    Attributes:
        frames_taken: the number of frames; 1 for a still image.
        anatomy_terms: the anatomy terms of its DICOM object.
        notices: notes for the caller.
        patches: the pixels.
        vision_input: the pixels in the router's format.
    """

    frames_taken: int
    anatomy_terms: tuple[str, ...]
    notices: tuple[str, ...]
    patches: VisionPatches
    vision_input: vision_pb2.VisionInput


class ImageLoader:
    """Decodes image files and splits them into patches. For one event loop."""

    def __init__(self, processor: RequestProcessor, decoders: DecoderPool, threads: int) -> None:
        """Takes what cuts up, what decodes, and the number of threads to cut up on."""
        self._processor = processor
        self._threads = FairThreads(ThreadPoolExecutor(threads, thread_name_prefix="picture"), threads)
        self.decoders = decoders

    async def load(self, content: bytes, *, field: str, request_id: str, caller: bytes) -> LoadedImage:
        """Loads an image.

        Args:
            content: the file's bytes.
            field: the request's field, for errors.
            request_id: the request's id, for the log.
            caller: callers share decoders and threads equally.

        Raises:
            InvalidRequestError: it cannot be decoded, or exceeds a limit.
            ShuttingDownError: the decoders have ended.
        """
        decoded = await self.decoders.decode(content, field=field, request_id=request_id, caller=caller)
        return await self._threads.run(caller, self._cut, decoded)

    async def close(self) -> None:
        """Ends the decoders and the threads."""
        await self.decoders.close()
        self._threads.shutdown()

    def _cut(self, decoded: DecodedImage) -> LoadedImage:
        frames = decoded.frames if decoded.is_video else decoded.frames[:1]
        patches = self._processor.scaled_patches(frames, is_video=decoded.is_video)
        notices = decoded.notices
        if decoded.frames_taken < decoded.source_frames:
            spread = f"{decoded.frames_taken} of its {decoded.source_frames} frames were looked at, evenly spread."
            notices = (spread, *notices)
        return LoadedImage(decoded.frames_taken, decoded.anatomy_terms, notices, patches, _to_proto(patches))


def decoder_pool(processor: RequestProcessor, gateway: GatewaySection) -> DecoderPool:
    """The decoders of a gateway, not started yet."""
    limits = ImageLimits(
        max_image_bytes=gateway.max_image_bytes,
        max_image_pixels=gateway.max_image_pixels,
        max_frames=gateway.max_frames,
        crop_to_regions=gateway.crop_to_regions,
    )
    scaling = processor.scaling(gateway.max_visual_tokens)
    settings = DecoderSettings(limits, scaling, gateway.decoders.max_memory_bytes)
    return DecoderPool(settings, processes=gateway.decoders.processes, max_cpu_s=gateway.decoders.max_cpu_s)


def _to_proto(item: VisionPatches) -> vision_pb2.VisionInput:
    kind = vision_pb2.VISION_KIND_VIDEO if item.is_video else vision_pb2.VISION_KIND_IMAGE
    grid_t, grid_h, grid_w = item.grid
    patches = tensor_pb2.Tensor(
        dtype=tensor_pb2.DATA_TYPE_FLOAT32,
        shape=item.patches.shape,
        data=item.patches.astype("<f4", copy=False).tobytes(),
    )
    return vision_pb2.VisionInput(kind=kind, grid_t=grid_t, grid_h=grid_h, grid_w=grid_w, patches=patches)
