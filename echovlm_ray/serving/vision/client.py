"""How a router reaches the vision encoders: patches go out, embeddings come back, and the gateway carries neither."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import torch

from echovlm_ray.errors import DeadlineError, PartUnavailableError
from echovlm_ray.serving.grpc.absence import Absence
from echovlm_ray.serving.grpc.replica_pool import ReplicaPool
from experts.transport.codec import tensor_from_proto
from experts.transport.inner_channel import InnerChannels
from protos import vision_pb2, vision_pb2_grpc

RETRY_INTERVAL_S = 0.2
# A killed replica is back after a few seconds; a request that waits for longer than this should hear so.
RETRY_FOR_S = 15.0


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPicture:
    """An image or a video as the language model sees it.

    Attributes:
        content_digest: over the picture and the encoder; equal digests mean equal embeddings.
        embedding: visual tokens × hidden.
    """

    content_digest: str
    embedding: torch.Tensor


class VisionClient:
    """Encodes through whichever vision encoder replica is least busy; tries another when one is lost."""

    def __init__(self, addresses: Callable[[], Sequence[str]], channels: InnerChannels) -> None:
        """`addresses` gives the live replicas at any time, and `channels` connects to them."""
        self._addresses = addresses
        self._pool: ReplicaPool[grpc.aio.Channel] = ReplicaPool(channels.asynchronous)
        self._absence = Absence(RETRY_FOR_S)

    async def encode(
        self,
        inputs: Sequence[vision_pb2.VisionInput],
        deadline: float | None,
        cache_salt: bytes = b"",
        caller: bytes = b"",
    ) -> list[EncodedPicture]:
        """The embeddings of the inputs, in order.

        Encoding has no effect but its result, so a lost call is sent again, for `RETRY_FOR_S` or until the deadline.

        Args:
            inputs: preprocessed images and videos.
            deadline: in `time.monotonic` seconds, or None.
            cache_salt: embeddings are shared only with requests of the same one.
            caller: callers share the encoder equally.

        Raises:
            PartUnavailableError: no encoder answered; without a deadline after one failed try.
            DeadlineError: the encoder was reached but did not finish in time.
            grpc.aio.AioRpcError: the encoder refused the inputs; `serving.grpc.errors` passes its status on.
        """
        request = vision_pb2.EncodeRequest(inputs=inputs, cache_salt=cache_salt, caller=caller)
        give_up = None if deadline is None else min(deadline, time.monotonic() + RETRY_FOR_S)
        tried: Counter[str] = Counter()
        reason = "no replica is running"
        while True:
            address = self._pool.least_busy(self._addresses(), tried)
            if address is not None and address not in tried:
                self._absence.is_over()
                tried[address] += 1
                try:
                    response = await self._call(address, request, deadline)
                    return [
                        EncodedPicture(item.content_digest, tensor_from_proto(item.embedding))
                        for item in response.embeddings
                    ]
                except grpc.aio.AioRpcError as error:
                    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                        raise DeadlineError("the deadline passed while the images were encoded") from error
                    if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                        raise
                    reason = "the replica was lost during the call"
                    continue
            # Every live replica was tried once: their successors need a moment.
            if not tried and give_up is not None:
                give_up = min(give_up, self._absence.ends())
            tried.clear()
            if give_up is None or time.monotonic() + RETRY_INTERVAL_S >= give_up:
                raise PartUnavailableError("the vision encoder", reason)
            await asyncio.sleep(RETRY_INTERVAL_S)

    async def close(self) -> None:
        """Closes all channels."""
        for channel in self._pool.keep_only(()):
            await channel.close()

    async def _call(
        self, address: str, request: vision_pb2.EncodeRequest, deadline: float | None
    ) -> vision_pb2.EncodeResponse:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        with self._pool.call(address) as channel:
            stub = vision_pb2_grpc.VisionEncoderStub(channel)
            response: vision_pb2.EncodeResponse = await stub.Encode(request, timeout=timeout)
            return response
