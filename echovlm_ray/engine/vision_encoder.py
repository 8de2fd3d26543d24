"""The vision encoder: patches to embeddings, many inputs in one forward pass, each picture encoded once.

Belongs to an event loop; the forward pass runs on a separate thread.
"""

import asyncio
import hashlib
import math
import struct
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from echovlm_ray.errors import InvalidRequestError, OverloadedError
from echovlm_ray.fair_queue import FairQueue
from echovlm_ray.model.packing import pack_linears
from echovlm_ray.model.vision_tower import EchoVLMVisionTower
from experts.bundles.digest import digest_of

# For so long after inputs of several callers waited, a forward pass takes this part of the patches that it may, so that
# one caller's input does not wait for many of another's, nor is computed beside them.
SHARED_S = 10.0
SHARED_BATCH = 16
# One in this many places of the queue is reserved for callers without a waiting input.
RESERVED = 4


@dataclass(frozen=True, slots=True, eq=False)
class EncoderInput:
    """One image or video: its patch grid (time, height, width), and float32 patches, one row each.

    Attributes:
        salt: it shares an embedding only with inputs of the same one.
        caller: takes turns with the others among the inputs that wait.
    """

    grid: tuple[int, int, int]
    patches: torch.Tensor
    salt: bytes = b""
    caller: bytes = b""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedInput:
    """An input's embedding, merged patches × hidden size, on the CPU.

    Attributes:
        content_digest: SHA-256 over the encoder's digest, the salt, the grid and the patches.
        cached: whether it came from the cache.
    """

    content_digest: str
    embedding: torch.Tensor
    cached: bool


@dataclass(slots=True, eq=False)
class _Job:
    """A waiting or running input, and the number of its callers."""

    item: EncoderInput
    result: asyncio.Future[torch.Tensor]
    callers: int = field(default=0)


def encoder_digest(backbone_digest: str, dtype: torch.dtype) -> str:
    """The identity of an encoder: the weights it computes with, and in which type."""
    return digest_of({"backbone": backbone_digest, "dtype": str(dtype).removeprefix("torch.")})


def content_digest(encoder: str, item: EncoderInput) -> str:
    """The key of an embedding: SHA-256 over the encoder's digest, the salt, the grid and the patches."""
    digest = hashlib.sha256(encoder.encode())
    digest.update(struct.pack("<I", len(item.salt)) + item.salt)
    digest.update(struct.pack("<3I", *item.grid))
    digest.update(item.patches.contiguous().numpy().data)
    return digest.hexdigest()


class EmbeddingCache:
    """The embeddings used last, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, torch.Tensor] = OrderedDict()
        self.num_bytes = 0

    def get(self, digest: str) -> torch.Tensor | None:
        """The embedding of a content digest, if it is still there."""
        embedding = self._entries.get(digest)
        if embedding is not None:
            self._entries.move_to_end(digest)
        return embedding

    def put(self, digest: str, embedding: torch.Tensor) -> None:
        """Caches an embedding, and evicts the least recently used ones; one above the limit is not cached."""
        if digest in self._entries or embedding.nbytes > self._max_bytes:
            return
        self._entries[digest] = embedding
        self.num_bytes += embedding.nbytes
        while self.num_bytes > self._max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self.num_bytes -= dropped.nbytes


class VisionEncoder:
    """Batches concurrent inputs, and computes an input once for several concurrent callers."""

    def __init__(
        self, tower: EchoVLMVisionTower, digest: str, *, cache_bytes: int, max_batch_patches: int, max_queue: int
    ) -> None:
        """
        Args:
            tower: see `echovlm_ray.model.checkpoint.load_vision_tower`. On a CPU its linear layers are packed, so that
                an input's embedding has the same bits in every batch.
            digest: the encoder's identity (`encoder_digest`).
            cache_bytes: the size of the cache; 0 disables it.
            max_batch_patches: patches in one forward pass; a larger input is refused.
            max_queue: inputs that may wait.
        """
        self.digest = digest
        self.max_batch_patches = max_batch_patches
        self.merge_size = int(tower.config.spatial_merge_size)
        self.patch_dim = tower.patch_embed.proj.weight[0].numel()
        self.cache = EmbeddingCache(cache_bytes)
        pack_linears(tower)
        self._tower = tower
        self._max_queue = max_queue
        self._jobs: dict[str, _Job] = {}
        self._waiting: FairQueue[str] = FairQueue()
        self._shared_until = -math.inf
        self._arrived = asyncio.Event()
        # Since the start, those that need no computing as well.
        self.inputs_taken = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vision")
        self._worker: asyncio.Task[None] | None = None

    @property
    def queue_length(self) -> int:
        """Inputs that wait or are computed."""
        return len(self._jobs)

    async def encode(self, items: Sequence[EncoderInput]) -> list[EncodedInput]:
        """The embeddings of the inputs, in order.

        A caller that leaves takes its waiting inputs along, unless others wait for them too.

        Raises:
            OverloadedError: too many inputs wait.
            InvalidRequestError: a single input is larger than the largest batch.
        """
        for index, item in enumerate(items):
            if len(item.patches) > self.max_batch_patches:
                raise InvalidRequestError(
                    f"inputs[{index}].patches",
                    f"has {len(item.patches)} patches and the limit is {self.max_batch_patches} "
                    "(vision.max_batch_patches): send a smaller image or fewer frames",
                )
        self.inputs_taken += len(items)
        digests = await asyncio.to_thread(lambda: [content_digest(self.digest, item) for item in items])
        cached = {digest: embedding for digest in digests if (embedding := self.cache.get(digest)) is not None}
        wanted = {digest: item for digest, item in zip(digests, items, strict=True) if digest not in cached}
        jobs = self._join(wanted)
        try:
            computed = {digest: await asyncio.shield(job.result) for digest, job in jobs.items()}
        finally:
            self._leave(jobs)
        return [
            EncodedInput(digest, cached[digest] if digest in cached else computed[digest], digest in cached)
            for digest in digests
        ]

    async def close(self) -> None:
        """Ends the thread; callers that still wait are cancelled."""
        if self._worker is not None:
            self._worker.cancel()
        for job in self._jobs.values():
            job.result.cancel()
        self._jobs.clear()
        self._waiting.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _join(self, wanted: dict[str, EncoderInput]) -> dict[str, _Job]:
        new = [digest for digest in wanted if digest not in self._jobs]
        if new and len(self._waiting) + len(new) > self._max_queue:
            raise OverloadedError(
                f"{len(self._waiting)} images wait for the vision encoder, and with {len(new)} more they would be over "
                f"the limit of {self._max_queue} (vision.max_queue)"
            )
        share = self._max_queue - self._max_queue // RESERVED
        caller = wanted[new[0]].caller if new else b""
        if caller and self._waiting.count(caller) and len(self._waiting) + len(new) > share:
            raise OverloadedError(
                f"{len(self._waiting)} images wait for the vision encoder, some of this caller, and the last "
                f"{self._max_queue - share} places are for callers of which none waits (vision.max_queue)"
            )
        loop = asyncio.get_running_loop()
        for digest in new:
            self._jobs[digest] = _Job(wanted[digest], loop.create_future())
            self._waiting.append(wanted[digest].caller, digest)
        jobs = {digest: self._jobs[digest] for digest in wanted}
        for job in jobs.values():
            job.callers += 1
        if new:
            if self._worker is None or self._worker.done():
                self._worker = loop.create_task(self._work())
            self._arrived.set()
        return jobs

    def _leave(self, jobs: dict[str, _Job]) -> None:
        for digest, job in jobs.items():
            job.callers -= 1
            # Since the job ended, the same image may have arrived again as a separate job that others wait for.
            unwanted = not job.callers and self._jobs.get(digest) is job
            if unwanted and self._waiting.discard(job.item.caller, digest):
                del self._jobs[digest]

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            digests = self._next_batch()
            if not digests:
                self._arrived.clear()
                continue
            batch = [self._jobs[digest] for digest in digests]
            try:
                embeddings = await loop.run_in_executor(self._thread, self._forward, [job.item for job in batch])
            except Exception as error:
                for digest, job in zip(digests, batch, strict=True):
                    del self._jobs[digest]
                    if not job.result.done():
                        job.result.set_exception(error)
                        # Retrieved here too: without callers it would never be, and asyncio would log a warning.
                        job.result.exception()
                continue
            for digest, job, embedding in zip(digests, batch, embeddings, strict=True):
                self.cache.put(digest, embedding)
                del self._jobs[digest]
                if not job.result.done():
                    job.result.set_result(embedding)

    def _next_batch(self) -> list[str]:
        now = time.monotonic()
        if self._waiting.num_callers > 1:
            self._shared_until = now + SHARED_S
        limit = self.max_batch_patches // SHARED_BATCH if now < self._shared_until else self.max_batch_patches
        digests: list[str] = []
        patches = 0
        while self._waiting:
            patches += len(self._jobs[self._waiting.first()].item.patches)
            if digests and patches > limit:
                break
            digests.append(self._waiting.pop())
        return digests

    @torch.inference_mode()
    def _forward(self, items: Sequence[EncoderInput]) -> list[torch.Tensor]:
        """One pass over several inputs; attention stays within each frame pair, so neighbours do not matter."""
        device, dtype = self._tower.device, self._tower.dtype
        patches = torch.cat([item.patches for item in items]).to(device=device, dtype=dtype)
        grids = torch.tensor([item.grid for item in items], device=device)
        embeddings = self._tower(patches, grid_thw=grids).pooler_output.cpu()
        sizes = [len(item.patches) // self.merge_size**2 for item in items]
        # Copies, because a cached view would keep its whole batch in memory.
        return [part.clone() for part in embeddings.split(sizes)]
