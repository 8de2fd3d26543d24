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
from echovlm_ray.errors import DeadlineError

logger = logging.getLogger(__name__)


class EngineStoppedError(RuntimeError):
    """The engine is shutting down; the request may be sent to another router."""


class Engine:
    """Runs requests by continuous batching on a thread of its own.

    `submit` and `cancel` may be called from any thread; sinks are called from the engine's thread and must not block.
    """

    def __init__(
        self, runner: ModelRunner, *, max_batch_size: int, max_queue: int, max_prefill_tokens: int
    ) -> None:
        self._runner = runner
        self._scheduler = Scheduler(
            BlockPool(runner.num_blocks),
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
        """Ends all requests with `EngineStoppedError`, and the thread."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()

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
            EngineStoppedError: the engine is shutting down.
        """
        sequence = Sequence.start(request, sink)
        with self._condition:
            if self._stopping:
                raise EngineStoppedError("the router is shutting down")
            self._scheduler.add(sequence)
            self._condition.notify()
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence at the next step, without telling its sink; harmless when it has ended."""
        with self._condition:
            sequence.cancelled = True
            self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._drop_ended()
                while not self._stopping and not (chunks := self._scheduler.schedule()):
                    self._condition.wait(self._idle_seconds())
                    self._drop_ended()
                if self._stopping:
                    self._fail_all(EngineStoppedError("the router is shutting down"))
                    return
            try:
                results = self._runner.step(chunks)
            except Exception as error:
                # A bug or exhausted device memory: those requests end, the engine goes on.
                logger.exception("a step failed")
                self._end(chunks, error)
                continue
            for chunk, result in zip(chunks, results, strict=True):
                try:
                    self._commit(chunk, result)
                except Exception as error:
                    logger.exception("a sequence failed")
                    self._end([chunk], error)

    def _idle_seconds(self) -> float | None:
        deadlines = [
            sequence.request.deadline
            for sequence in (*self._scheduler.running, *self._scheduler.waiting)
            if sequence.request.deadline is not None
        ]
        retry = self._scheduler.next_retry()
        wake = min([*deadlines, *([] if retry is None else [retry])], default=None)
        return None if wake is None else max(0.0, wake - time.monotonic())

    def _drop_ended(self) -> None:
        now = time.monotonic()
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            if sequence.cancelled:
                self._scheduler.finish(sequence)
            elif sequence.expired(now):
                self._scheduler.finish(sequence)
                sequence.sink(sequence.stalled_by or DeadlineError("the deadline passed before the answer was complete"))

    def _fail_all(self, error: Exception) -> None:
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            self._scheduler.finish(sequence)
            sequence.sink(error)

    def _end(self, chunks: list[Chunk], error: Exception) -> None:
        with self._condition:
            for chunk in chunks:
                self._scheduler.finish(chunk.sequence)
        for chunk in chunks:
            chunk.sequence.sink(error)

    def _commit(self, chunk: Chunk, result: ChunkResult) -> None:
        sequence = chunk.sequence
        if result.failure is not None:
            # The step is simply run again: experts are pure, and its cache slots will be written again.
            sequence.stalled_by = result.failure
            sequence.retry_at = time.monotonic() + min(result.failure.retry_after_s, 0.25)
            return
        sequence.stalled_by = None
        sequence.num_computed = chunk.end
        for organ, pairs in result.routed_pairs.items():
            sequence.routed_pairs[organ] = sequence.routed_pairs.get(organ, 0) + pairs
        wanted = sequence.request.return_logits
        if wanted and result.logits_TV is not None:
            sequence.prompt_logits.append(result.logits_TV)
        if chunk.end < len(sequence.token_ids):
            return
        assert result.logits_TV is not None
        token_id = next_token(sequence, result.logits_TV[-1])
        sequence.token_ids.append(token_id)
        finish = _finish(sequence, token_id)
        logits = torch.cat(sequence.prompt_logits) if wanted else None
        sequence.prompt_logits.clear()
        if finish is not None:
            with self._condition:
                self._scheduler.finish(sequence)
        sequence.sink(StepOutput(token_id, logits, finish, None if finish is None else sequence.routed_pairs))


def _finish(sequence: Sequence, token_id: int) -> Finish | None:
    if token_id in sequence.request.stop_token_ids:
        return Finish.STOP
    if sequence.num_generated >= sequence.request.max_new_tokens:
        return Finish.LENGTH
    return None
