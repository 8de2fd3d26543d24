"""The engine: a thread that steps all running requests together until each is done."""

import logging
import threading
import time

import torch

from echovlm_ray.engine.kv_cache import BlockPool
from echovlm_ray.engine.runner import ChunkResult, ModelRunner
from echovlm_ray.engine.sampler import next_token
from echovlm_ray.engine.scheduler import Chunk, Scheduler
from echovlm_ray.engine.sequence import Finish, Sequence, SequenceRequest, Sink, StepOutput
from echovlm_ray.errors import DeadlineError, ShuttingDownError
from router.errors import ExpertsUnavailableError

logger = logging.getLogger(__name__)


class Engine:
    """Runs requests by continuous batching on a thread of its own.

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
    ) -> None:
        """The limits are the fields of the same names in `RouterSection`."""
        self._runner = runner
        self._max_request_s = max_request_s
        self._scheduler = Scheduler(
            BlockPool(runner.num_blocks),
            runner.unavailable,
            max_batch_size=max_batch_size,
            max_queue=max_queue,
            max_prefill_tokens=max_prefill_tokens,
        )
        self._condition = threading.Condition()
        self._stopping = False
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
        """Requests that wait or run."""
        return len(self._scheduler.waiting) + len(self._scheduler.running)

    @property
    def free_blocks(self) -> int:
        """Cache blocks that no request holds."""
        return self._scheduler.pool.num_free

    def submit(self, request: SequenceRequest, sink: Sink) -> Sequence:
        """Queues a request.

        Raises:
            OverloadedError: the queue is full or the cache too small for the request.
            ShuttingDownError: the engine is shutting down.
        """
        sequence = Sequence.start(request, sink, self._max_request_s)
        with self._condition:
            if self._stopping:
                raise ShuttingDownError("the router is shutting down")
            self._scheduler.add(sequence)
            self._condition.notify()
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence at the next step, without telling its sink; harmless when it has ended."""
        with self._condition:
            sequence.cancelled = True
            self._condition.notify()

    def _run(self) -> None:
        while (chunks := self._next_chunks()) is not None:
            try:
                results = self._runner.step(chunks)
            except Exception as error:
                # A bug or exhausted device memory: those requests end, the engine goes on.
                logger.exception("a step failed")
                for chunk in chunks:
                    self._end(chunk.sequence, error)
                continue
            for chunk, result in zip(chunks, results, strict=True):
                try:
                    self._commit(chunk, result)
                except Exception as error:
                    logger.exception("a sequence failed")
                    self._end(chunk.sequence, error)

    def _next_chunks(self) -> list[Chunk] | None:
        """Waits until there is something to compute; None when the engine is to stop."""
        with self._condition:
            while not self._stopping:
                self._drop_ended()
                if chunks := self._scheduler.schedule():
                    return chunks
                self._condition.wait(self._idle_seconds())
            for sequence in (*self._scheduler.running, *self._scheduler.waiting):
                self._end(sequence, ShuttingDownError("the router is shutting down"))
            return None

    def _idle_seconds(self) -> float | None:
        wake = [sequence.deadline for sequence in (*self._scheduler.running, *self._scheduler.waiting)]
        if (retry := self._scheduler.next_retry()) is not None:
            wake.append(retry)
        return max(0.0, min(wake) - time.monotonic()) if wake else None

    def _drop_ended(self) -> None:
        now = time.monotonic()
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            if sequence.cancelled:
                self._scheduler.finish(sequence)
            elif sequence.deadline <= now:
                late = DeadlineError("the deadline passed before the answer was complete")
                self._end(sequence, sequence.stalled_by or late)
        for sequence in self._scheduler.overflow():
            assert sequence.stalled_by is not None
            self._end(sequence, sequence.stalled_by)

    def _end(self, sequence: Sequence, error: Exception) -> None:
        with self._condition:
            self._scheduler.finish(sequence)
        _deliver(sequence, error)

    def _commit(self, chunk: Chunk, result: ChunkResult) -> None:
        sequence = chunk.sequence
        if isinstance(result.failure, ExpertsUnavailableError):
            # The step is simply run again: experts are pure, and its cache slots will be written again.
            if not sequence.num_stalls:
                logger.warning("a request waits: %s", result.failure)
            sequence.stall(result.failure, time.monotonic())
            return
        if result.failure is not None:
            logger.error("a request failed: %s", result.failure)
            self._end(sequence, result.failure)
            return
        sequence.resume()
        sequence.num_computed = chunk.end
        for organ, pairs in result.routed_pairs.items():
            sequence.routed_pairs[organ] = sequence.routed_pairs.get(organ, 0) + pairs
        if sequence.request.return_logits and result.logits_TV is not None:
            sequence.prompt_logits.append(result.logits_TV)
            sequence.num_logits += len(result.logits_TV)
        if not chunk.reaches_last_token:
            return
        assert result.logits_TV is not None
        token_id = next_token(sequence, result.logits_TV[-1])
        sequence.token_ids.append(token_id)
        finish = _finish(sequence, token_id)
        logits_TV = torch.cat(sequence.prompt_logits) if sequence.prompt_logits else None
        sequence.prompt_logits.clear()
        if finish is not None:
            with self._condition:
                self._scheduler.finish(sequence)
        tells = finish is not None or sequence.num_generated == 1
        routed_pairs = dict(sequence.routed_pairs) if tells else None
        _deliver(sequence, StepOutput(token_id, logits_TV, finish, routed_pairs))


def _deliver(sequence: Sequence, output: StepOutput | Exception) -> None:
    if sequence.cancelled:
        return
    try:
        sequence.sink(output)
    except Exception:
        # Whoever asked is gone; nobody else may suffer from it.
        logger.exception("a sink failed")
        sequence.cancelled = True


def _finish(sequence: Sequence, token_id: int) -> Finish | None:
    if token_id in sequence.request.stop_token_ids:
        return Finish.STOP
    if sequence.num_generated >= sequence.request.max_new_tokens:
        return Finish.LENGTH
    return None
