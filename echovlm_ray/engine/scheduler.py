"""Decides which sequences take part in the next step."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from echovlm_ray.engine.kv_cache import BLOCK_SIZE, BlockPool
from echovlm_ray.engine.sequence import Sequence
from echovlm_ray.errors import OverloadedError
from router.errors import ExpertsUnavailableError

# Says, without waiting, why a sequence's experts cannot be reached now, or None.
Unavailable = Callable[[Sequence], ExpertsUnavailableError | None]


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

    A sequence is admitted when the cache has blocks for its longest possible end. One whose experts do not answer is
    stalled: it counts for nothing in the batch, and gives its blocks to others that need them, so that a lost organ
    does not keep the other organs' requests waiting. It is then computed again from its first token.
    """

    def __init__(
        self,
        pool: BlockPool,
        unavailable: Unavailable,
        *,
        max_batch_size: int,
        max_queue: int,
        max_prefill_tokens: int,
    ) -> None:
        self.pool = pool
        self.unavailable = unavailable
        self.max_batch_size = max_batch_size
        self.max_queue = max_queue
        self.max_prefill_tokens = max_prefill_tokens
        self.waiting: deque[Sequence] = deque()
        # In the order of admission, stalled ones included.
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
        self._release(sequence)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, in the order in which the sequences came."""
        now = time.monotonic()
        ready = [sequence for sequence in self.running if self._is_ready(sequence, now)]
        self._admit(ready, now)
        budget = self.max_prefill_tokens
        chunks = []
        for sequence in ready[: self.max_batch_size]:
            if not sequence.block_table and not self._allocate(sequence, ready):
                continue
            count = sequence.num_pending
            if count > 1:
                count = min(count, budget)
                budget -= count
            if count:
                chunks.append(Chunk(sequence, sequence.num_computed, sequence.num_computed + count))
        return chunks

    def overflow(self) -> list[Sequence]:
        """The latest stalled sequences beyond `max_queue` of them, which there is no place to keep."""
        stalled = [sequence for sequence in self.running if sequence.stalled_by]
        return stalled[self.max_queue :]

    def next_retry(self) -> float | None:
        """When the first stalled sequence may run again, in `time.monotonic` seconds; None when nothing is stalled."""
        return min((sequence.retry_at for sequence in self.running if sequence.stalled_by), default=None)

    def _is_ready(self, sequence: Sequence, now: float) -> bool:
        if sequence.retry_at > now:
            return False
        if (error := self.unavailable(sequence)) is not None:
            sequence.stall(error, now)
            return False
        return True

    def _admit(self, ready: list[Sequence], now: float) -> None:
        while self.waiting and len(ready) < self.max_batch_size:
            sequence = self.waiting[0]
            if not self._allocate(sequence, ready):
                return
            self.running.append(self.waiting.popleft())
            if self._is_ready(sequence, now):
                ready.append(sequence)

    def _allocate(self, sequence: Sequence, ready: list[Sequence]) -> bool:
        count = BlockPool.blocks_for(sequence.max_tokens)
        # The latest gives first: it has the least to compute again.
        holders = [holder for holder in self.running if holder.block_table and holder not in ready]
        while (blocks := self.pool.allocate(count)) is None:
            if not holders:
                return False
            holder = holders.pop()
            self._release(holder)
            holder.forget_computed()
        sequence.block_table = blocks
        return True

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table = []
