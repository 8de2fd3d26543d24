"""The vision encoder's gRPC service: checks what it is sent, and hands it to the encoder."""

import asyncio
from typing import Any

import grpc
import torch

from echovlm_ray.engine.vision_encoder import EncoderInput, VisionEncoder
from echovlm_ray.errors import InvalidRequestError
from experts.bundles.finite import is_finite
from experts.errors import InvalidTensorError
from experts.transport.codec import tensor_from_proto, tensor_to_proto
from protos import tensor_pb2, vision_pb2, vision_pb2_grpc

KINDS = (vision_pb2.VISION_KIND_IMAGE, vision_pb2.VISION_KIND_VIDEO)


class VisionEncoderService(vision_pb2_grpc.VisionEncoderServicer):
    """Serves `echovlm.v1.VisionEncoder`."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self._encoder = encoder

    @property
    def queue_length(self) -> int:
        """Inputs that wait or are computed, for status."""
        return self._encoder.queue_length

    async def Encode(
        self, request: vision_pb2.EncodeRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> vision_pb2.EncodeResponse:
        """Encodes images and videos; a caller that leaves, or whose deadline passes, is dropped from the queue.

        Raises:
            InvalidRequestError: no inputs, or one whose patches do not fit its grid or the model.
            OverloadedError: too many inputs wait.
        """
        if not request.inputs:
            raise InvalidRequestError("inputs", "is empty; send at least one image or video")
        items = await asyncio.to_thread(self._read_inputs, request)
        encoded = await self._encoder.encode(items)
        return vision_pb2.EncodeResponse(
            encoder_digest=self._encoder.digest,
            embeddings=[
                vision_pb2.VisionEmbedding(
                    content_digest=item.content_digest, cached=item.cached, embedding=tensor_to_proto(item.embedding)
                )
                for item in encoded
            ],
        )

    def _read_inputs(self, request: vision_pb2.EncodeRequest) -> list[EncoderInput]:
        for index, message in enumerate(request.inputs):
            self._check(message, f"inputs[{index}]")
        grids = [(message.grid_t, message.grid_h, message.grid_w) for message in request.inputs]
        patches = [self._read(message, f"inputs[{index}].patches") for index, message in enumerate(request.inputs)]
        return [
            EncoderInput(grid, item, request.cache_salt, request.caller)
            for grid, item in zip(grids, patches, strict=True)
        ]

    def _check(self, message: vision_pb2.VisionInput, field: str) -> None:
        if message.kind not in KINDS:
            raise InvalidRequestError(f"{field}.kind", "must be VISION_KIND_IMAGE or VISION_KIND_VIDEO")
        grid = (message.grid_t, message.grid_h, message.grid_w)
        if message.kind == vision_pb2.VISION_KIND_IMAGE and message.grid_t != 1:
            raise InvalidRequestError(f"{field}.grid_t", f"is {message.grid_t}; an image has 1")
        merge = self._encoder.merge_size
        if not all(grid) or message.grid_h % merge or message.grid_w % merge:
            raise InvalidRequestError(
                field,
                f"has the grid {grid}: all sides must be positive, and height and width multiples of {merge} "
                "(spatial_merge_size)",
            )
        expected = [message.grid_t * message.grid_h * message.grid_w, self._encoder.patch_dim]
        if list(message.patches.shape) != expected or message.patches.dtype != tensor_pb2.DATA_TYPE_FLOAT32:
            raise InvalidRequestError(
                f"{field}.patches",
                f"has the shape {list(message.patches.shape)[:8]}; the grid {grid} takes {expected} of float32",
            )

    def _read(self, message: vision_pb2.VisionInput, field: str) -> torch.Tensor:
        try:
            patches = tensor_from_proto(message.patches)
        except InvalidTensorError as error:
            raise InvalidRequestError(field, str(error)) from error
        if not is_finite(patches):
            raise InvalidRequestError(field, "holds values that are not finite; send what the processor made")
        return patches
