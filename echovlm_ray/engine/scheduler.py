"""Decides which sequences take part in the next step."""

import time
from collections import deque
from dataclasses import dataclass

from echovlm_ray.engine.kv_cache import BLOCK_SIZE, BlockPool
from echovlm_ray.engine.sequence import Sequence
from echovlm_ray.errors import OverloadedError


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def reaches_last_token(self) -> bool:
        """Whether the step yields the logits of the sequence's next token."""
        return self.end == len(self.sequence.token_ids)


class Scheduler:
    """Continuous batching: every step takes all decoding sequences, then as much prefill as the budget allows.

    A sequence is admitted when the cache has blocks for its longest possible end, so a running one never has to be
    put back. Stalled sequences keep their place and their blocks, and are passed over until their experts answer.
    """

    def __init__(self, pool: BlockPool, *, max_batch_size: int, max_queue: int, max_prefill_tokens: int) -> None:
        self.pool = pool
        self.max_batch_size = max_batch_size
        self.max_queue = max_queue
        self.max_prefill_tokens = max_prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the queue.

        Raises:
            OverloadedError: the queue is full, or the cache could never hold the sequence.
        """
        if len(self.waiting) >= self.max_queue:
            raise OverloadedError(f"{self.max_queue} requests already wait (router.max_queue)")
        if BlockPool.blocks_for(sequence.max_tokens) > self.pool.num_blocks:
            raise OverloadedError(
                f"the request may need {sequence.max_tokens} tokens of cache, and the whole cache holds "
                f"{self.pool.num_blocks * BLOCK_SIZE} (router.kv_cache_tokens)"
            )
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Removes a sequence and frees its blocks; harmless when it is already gone."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.pool.release(sequence.block_table)
        sequence.block_table = []

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, in the order in which the sequences came."""
        self._admit()
        now = time.monotonic()
        ready = [sequence for sequence in self.running if sequence.retry_at <= now]
        budget = self.max_prefill_tokens
        chunks = []
        for sequence in ready:
            count = sequence.num_pending
            if count > 1:
                count = min(count, budget)
                budget -= count
            if count:
                chunks.append(Chunk(sequence, sequence.num_computed, sequence.num_computed + count))
        return chunks

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch_size:
            blocks = self.pool.allocate(BlockPool.blocks_for(self.waiting[0].max_tokens))
            if blocks is None:
                return
            sequence = self.waiting.popleft()
            sequence.block_table = blocks
            self.running.append(sequence)

    def next_retry(self) -> float | None:
        """When the first stalled sequence may run again, in `time.monotonic` seconds; None when nothing is stalled."""
        return min((sequence.retry_at for sequence in self.running if sequence.stalled_by), default=None)
