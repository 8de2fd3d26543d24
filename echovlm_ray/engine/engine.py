"""The engine: a thread that runs all requests together, step by step."""

import logging
import math
import threading
import time
from collections.abc import Callable
from itertools import pairwise

import torch

from echovlm_ray.engine.block_pool import BLOCK_SIZE, BlockPool
from echovlm_ray.engine.runner import ChunkResult, ModelRunner
from echovlm_ray.engine.sampler import next_tokens
from echovlm_ray.engine.scheduler import Chunk, Scheduler
from echovlm_ray.engine.sequence import Finish, Sequence, SequenceRequest, Sink, StepOutput
from echovlm_ray.errors import DeadlineError, ShuttingDownError
from router.dispatch.dispatcher import Dispatcher
from router.errors import ExpertsUnavailableError, ExpertsUnusableError

logger = logging.getLogger(__name__)

# Before a step with more tokens than this, the outputs of the last step are delivered.
_LONG_STEP_TOKENS = 64


class Engine:
    """Runs requests with continuous batching on its own thread.

    `submit` and `cancel` may be called from any thread; sinks are called from the engine's thread and must not block.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        max_batch_size: int,
        max_queue: int,
        max_prefill_tokens: int,
        max_request_s: float,
        prefix_reuse: bool = True,
    ) -> None:
        """The arguments after the first one are fields of `RouterSection`."""
        self._runner = runner
        self._max_request_s = max_request_s
        self._scheduler = Scheduler(
            BlockPool(runner.num_blocks),
            runner.unavailable,
            max_batch_size=max_batch_size,
            max_queue=max_queue,
            max_prefill_tokens=max_prefill_tokens,
            prefix_reuse=prefix_reuse,
        )
        # What is to be called for the outputs that were delivered since `_notify`. Used from the engine's thread alone.
        self._ready: set[Callable[[], None]] = set()
        self._condition = threading.Condition()
        self._stopping = False
        self._cancelled: list[Sequence] = []
        # A lower bound of all deadlines, so that a step compares one number instead of every sequence.
        self._next_deadline = math.inf
        # Since the start.
        self.requests_taken = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends all requests with `ShuttingDownError`, and the thread; then closes the connections to the experts."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._runner.dispatcher.placement.close()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def queue_length(self) -> int:
        """The number of waiting and running requests."""
        return len(self._scheduler.waiting) + len(self._scheduler.running)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation."""
        return self._runner.cache.dtype

    @property
    def num_blocks(self) -> int:
        """The number of cache blocks."""
        return self._scheduler.pool.num_blocks

    @property
    def free_blocks(self) -> int:
        """The number of cache blocks without a reference, including cached ones."""
        return self._scheduler.pool.num_free

    @property
    def cached_blocks(self) -> int:
        """The number of cache blocks without a reference and with cached contents."""
        return self._scheduler.pool.num_cached

    @property
    def prefix_hits(self) -> int:
        """The number of tokens since the start that were found in the prefix cache."""
        return self._scheduler.prefix_hits

    @property
    def preemptions(self) -> int:
        """The number of preemptions since the start."""
        return self._scheduler.preemptions

    @property
    def dispatcher(self) -> Dispatcher:
        """The dispatcher. A request's expert set must be added to it before the request is submitted."""
        return self._runner.dispatcher

    def submit(
        self,
        request: SequenceRequest,
        sink: Sink,
        gone: Callable[[], None] | None = None,
        on_outputs_ready: Callable[[], None] | None = None,
    ) -> Sequence:
        """Queues a request.

        Args:
            request: the request.
            sink: called with its outputs.
            gone: called once from the engine's thread, after the last call of the sink, when the engine has released
                the request, however it ended; its expert set is not used any more then. Must not block.
            on_outputs_ready: called from the engine's thread after the sink got outputs, at a moment when other threads
                of this process delay the engine least; once for all requests of a step that have an equal one.
                Idempotent; must not block.

        Raises:
            OverloadedError: the queue is full or the cache too small for the request.
            ShuttingDownError: the engine is shutting down.
        """
        experts = self.dispatcher.gates(request.expert_set_id).expert_set.used(request.shares)
        sequence = Sequence.start(request, sink, experts, self._max_request_s, gone, on_outputs_ready)
        with self._condition:
            if self._stopping:
                raise ShuttingDownError("the router is shutting down")
            self._scheduler.add(sequence)
            self.requests_taken += 1
            self._next_deadline = min(self._next_deadline, sequence.deadline)
            self._condition.notify()
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence at the next step, without telling its sink; harmless when it has ended."""
        with self._condition:
            sequence.cancelled = True
            self._cancelled.append(sequence)
            self._condition.notify()

    def evict_bundle(self, digest: str) -> None:
        """Drops what the cache keeps of a bundle that is used no more; running requests keep what they hold."""
        with self._condition:
            self._scheduler.pool.evict_bundle(digest)

    def evict_prefixes(self) -> None:
        """Drops all that the cache keeps for prompts that begin alike."""
        with self._condition:
            self._scheduler.pool.evict_all()

    def _run(self) -> None:
        while (chunks := self._next_chunks()) is not None:
            try:
                if sum(chunk.end - chunk.start for chunk in chunks) > _LONG_STEP_TOKENS:
                    self._notify()
                self._commit(chunks, self._runner.step(chunks, self._notify))
            except Exception as error:
                # A bug or exhausted device memory: these requests end, the engine continues.
                logger.exception("a step failed")
                for chunk in chunks:
                    self._end(chunk.sequence, error)

    def _next_chunks(self) -> list[Chunk] | None:
        """Waits for chunks to compute; None if the engine must stop."""
        with self._condition:
            while not self._stopping:
                self._drop_ended()
                if chunks := self._scheduler.schedule():
                    return chunks
                self._notify()
                self._condition.wait(self._idle_seconds())
            for sequence in (*self._scheduler.running, *self._scheduler.waiting):
                self._end(sequence, ShuttingDownError("the router is shutting down"))
            self._notify()
            return None

    def _idle_seconds(self) -> float | None:
        wake = self._next_deadline
        if (retry := self._scheduler.next_retry()) is not None:
            wake = min(wake, retry)
        return None if wake == math.inf else max(0.0, wake - time.monotonic())

    def _drop_ended(self) -> None:
        for sequence in self._cancelled:
            if self._scheduler.finish(sequence):
                self._release(sequence)
        self._cancelled.clear()
        now = time.monotonic()
        if now >= self._next_deadline:
            self._drop_expired(now)
        for sequence in self._scheduler.overflow():
            lost = sequence.lost()
            assert lost is not None
            self._end(sequence, lost)

    def _drop_expired(self, now: float) -> None:
        self._next_deadline = math.inf
        # Since the start.
        self.requests_taken = 0
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            if sequence.deadline <= now:
                late = DeadlineError("the deadline passed before the answer was complete")
                self._end(sequence, sequence.lost() or late)
            else:
                self._next_deadline = min(self._next_deadline, sequence.deadline)

    def _end(self, sequence: Sequence, error: Exception) -> None:
        with self._condition:
            was_there = self._scheduler.finish(sequence)
        if was_there:
            self._deliver(sequence, error)
            self._notify()
            self._release(sequence)

    def _notify(self) -> None:
        while self._ready:
            ready = self._ready.pop()
            try:
                ready()
            except Exception:
                # It must not end any request.
                logger.exception("on_outputs_ready failed")

    def _release(self, sequence: Sequence) -> None:
        if sequence.gone is None:
            return
        try:
            sequence.gone()
        except Exception:
            # An error here must not affect other requests.
            logger.exception("what follows the end of a request failed")

    def _deliver(self, sequence: Sequence, output: StepOutput | Exception) -> None:
        if sequence.cancelled:
            return
        if sequence.on_outputs_ready is not None:
            self._ready.add(sequence.on_outputs_ready)
        try:
            sequence.sink(output)
        except Exception:
            # The caller's error must not affect other requests.
            logger.exception("a sink failed")
            self.cancel(sequence)

    def _commit(self, chunks: list[Chunk], results: list[ChunkResult]) -> None:
        sampled = []
        for chunk, result in zip(chunks, results, strict=True):
            sequence = chunk.sequence
            if result.failure is not None:
                self._fail(sequence, result.failure)
                continue
            sequence.resume()
            sequence.add_computed(chunk.end, _block_pairs(chunk, result))
            if sequence.request.return_logits and result.logits_TV is not None:
                sequence.prompt_logits.append(result.logits_TV)
                sequence.num_logits += len(result.logits_TV)
            if chunk.reaches_last_token:
                assert result.logits_TV is not None
                sampled.append((sequence, result.logits_TV[-1]))
        for (sequence, _), token_id in zip(sampled, next_tokens(sampled), strict=True):
            if isinstance(token_id, Exception):
                self._fail(sequence, token_id)
                continue
            with self._condition:
                output = self._append(sequence, token_id)
            self._deliver(sequence, output)
            if output.finish is not None:
                self._release(sequence)

    def _append(self, sequence: Sequence, token_id: int) -> StepOutput:
        self._scheduler.publish(sequence)
        sequence.token_ids.append(token_id)
        logits_TV = torch.cat(sequence.prompt_logits) if sequence.prompt_logits else None
        sequence.prompt_logits.clear()
        finish = _finish(sequence, token_id)
        tells = finish is not None or sequence.num_generated == 1
        output = StepOutput(token_id, logits_TV, finish, sequence.routed_pairs() if tells else None)
        if finish is not None:
            self._scheduler.finish(sequence)
        return output

    def _fail(self, sequence: Sequence, failure: Exception) -> None:
        if isinstance(failure, ExpertsUnusableError):
            logger.warning("a request cannot be answered: %s", failure)
            self._end(sequence, failure)
            return
        if isinstance(failure, ExpertsUnavailableError):
            # The step is run again: experts are pure functions, and its cache slots are overwritten.
            if not sequence.num_stalls:
                logger.warning("a request waits: %s", failure)
            sequence.stall(failure, time.monotonic())
            return
        logger.error("a request failed: %s", failure)
        with self._condition:
            # Later requests must not reuse cached blocks that may have caused the failure.
            self._scheduler.pool.invalidate(sequence.block_table)
        self._end(sequence, failure)


def _finish(sequence: Sequence, token_id: int) -> Finish | None:
    if token_id in sequence.request.stop_token_ids:
        return Finish.STOP
    if sequence.num_generated >= sequence.request.max_new_tokens:
        return Finish.LENGTH
    return None


def _block_pairs(chunk: Chunk, result: ChunkResult) -> list[dict[str, int]]:
    """The routed pairs of a chunk's tokens for each block."""
    start, end = chunk.start, chunk.end
    bounds = [start, *range(start - start % BLOCK_SIZE + BLOCK_SIZE, end, BLOCK_SIZE), end]
    if len(bounds) == 2:
        return [result.routed_pairs]
    if chunk.sequence.request.shares:
        # All tokens use the same number of experts of each organ.
        each = {organ: pairs // (end - start) for organ, pairs in result.routed_pairs.items()}
        return [{organ: pairs * (to - begin) for organ, pairs in each.items()} for begin, to in pairwise(bounds)]
    assert result.row_pairs is not None, "several tokens of a flat set without the pairs of each"
    return [
        {organ: sum(counts[begin - start : to - start]) for organ, counts in result.row_pairs.items()}
        for begin, to in pairwise(bounds)
    ]
