"""Shadow requests: copies for a candidate, whose answers are discarded.

They use only spare capacity: there are few at a time, they start only if the batch and the cache have free capacity,
and they are cancelled as soon as another request needs it.
"""

import asyncio
import dataclasses
import logging
import threading
import time

from echovlm_ray.engine.block_pool import BlockPool
from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.sequence import Sequence, SequenceRequest, StepOutput
from echovlm_ray.errors import OverloadedError, ShuttingDownError
from echovlm_ray.serving.lm.admission import PinnedExperts
from echovlm_ray.serving.lm.outcomes import Outcomes
from echovlm_ray.serving.lm.runs import Run
from router.rollouts.shadow import ShadowRecord

logger = logging.getLogger(__name__)

# One in so many places of the batch may be a shadow's, and at most so many.
BATCH_SHARE = 4
MAX_SHADOWS = 4
STEP_ASIDE_S = 2.0
POLL_S = 0.002


class Shadows:
    """All shadows of a router."""

    def __init__(self, engine: Engine, outcomes: Outcomes, max_batch_size: int) -> None:
        self._engine = engine
        self._outcomes = outcomes
        self._max_batch_size = max_batch_size
        self._max_shadows = min(MAX_SHADOWS, max(1, max_batch_size // BATCH_SHARE))
        self._lock = threading.Lock()
        # In the order in which they began.
        self._running: dict[Shadow, None] = {}

    def __len__(self) -> int:
        return len(self._running)

    def prepare(self, experts: PinnedExperts, request: SequenceRequest) -> "Shadow":
        """A shadow of a request, not begun yet; it takes over the experts.

        Args:
            experts: the candidate's.
            request: the incumbent's, with a seed if it draws its tokens: both then draw alike.
        """
        request = dataclasses.replace(
            request,
            expert_set_id=experts.expert_set.id,
            shares=experts.choice.shares,
            # They would be computed and thrown away.
            return_logits=False,
            background=True,
        )
        return Shadow(self, experts, request, self._outcomes)

    def make_way(self, max_tokens: int) -> None:
        """To be called before another request is queued: as many shadows end as stand in its way.

        Args:
            max_tokens: the most that the request can ever have in the cache.
        """
        if not self._running:
            return
        with self._lock:
            running = list(self._running)
        excess = self._engine.queue_length + 1 - self._max_batch_size
        if not self._has_blocks(max_tokens):
            excess = len(running)
        if excess > 0:
            for shadow in running[-excess:]:
                shadow.end()

    async def step_aside(self) -> bool:
        """Ends all shadows and waits until the engine has let go of them; whether there were any."""
        with self._lock:
            running = list(self._running)
        for shadow in running:
            shadow.end()
        give_up = time.monotonic() + STEP_ASIDE_S
        while any(shadow in self._running for shadow in running) and time.monotonic() < give_up:
            await asyncio.sleep(POLL_S)
        return bool(running)

    def has_room(self, max_tokens: int) -> bool:
        """Whether one more may begin without taking anything from other requests."""
        return (
            len(self._running) < self._max_shadows
            and self._engine.queue_length < self._max_batch_size
            and self._has_blocks(max_tokens)
        )

    def is_in_the_way(self) -> bool:
        """Whether others wait, or could not grow."""
        queue_length = self._engine.queue_length
        return queue_length > self._max_batch_size or self._engine.free_blocks < queue_length

    def submit(self, shadow: "Shadow", request: SequenceRequest, run: Run) -> Sequence | None:
        """Submits a shadow to the engine if there is capacity; otherwise returns None."""
        if not self.has_room(len(request.input_ids) + request.max_new_tokens):
            return None
        with self._lock:
            self._running[shadow] = None
        try:
            return self._engine.submit(request, run.sink, run.gone)
        except (OverloadedError, ShuttingDownError):
            self.forget(shadow)
            return None

    def cancel(self, sequence: Sequence) -> None:
        """Cancels a shadow at the engine's next step."""
        self._engine.cancel(sequence)

    def forget(self, shadow: "Shadow") -> None:
        """A shadow has ended."""
        with self._lock:
            self._running.pop(shadow, None)

    def _has_blocks(self, max_tokens: int) -> bool:
        # Besides, every other request may want to grow by a block.
        return self._engine.free_blocks >= BlockPool.blocks_for(max_tokens) + self._engine.queue_length


class Shadow:
    """One request's shadow. Compared when both runs have made their last token; safe to use from several threads."""

    def __init__(self, shadows: Shadows, experts: PinnedExperts, request: SequenceRequest, outcomes: Outcomes) -> None:
        self._shadows = shadows
        self._request = request
        self._outcomes = outcomes
        # Together with a canary's experts it is not comparable.
        rollouts = {bundle: bundle.rollout for bundle in experts.used if bundle.rollout is not None}
        judged = tuple(bundle for bundle, rollout in rollouts.items() if rollout.mode == "shadow")
        self._rollout_ids = tuple(rollouts[bundle].rollout_id for bundle in judged)
        self._run = Run(experts, judged, outcomes, sink=self._watch, ended=self._ended)
        self._lock = threading.Lock()
        self._begun = False
        self._over = False
        self._compared = False
        self._sequence: Sequence | None = None
        self._incumbent: Run | None = None

    def begin(self) -> None:
        """Starts the shadow run, if there is capacity; called at most once, before `end`."""
        self._begun = True
        sequence = self._shadows.submit(self, self._request, self._run)
        with self._lock:
            self._sequence = sequence
            over = self._over
        if sequence is None:
            self._run.drop()
        elif over:
            self._shadows.cancel(sequence)

    def end(self) -> None:
        """Discards the shadow: the request was cancelled or failed, or capacity is needed."""
        with self._lock:
            self._over = True
            self._run.excluded_from_metrics = True
            sequence = self._sequence
        if sequence is not None:
            self._shadows.cancel(sequence)

    def leave(self, complete: bool) -> None:
        """The incumbent's caller has its answer, or has left: then the shadow ends too."""
        if not self._begun:
            self._run.drop()
        elif not complete:
            self.end()

    def incumbent_ended(self, run: Run) -> None:
        """The incumbent's run is over."""
        with self._lock:
            self._incumbent = run
        self._compare()

    def _watch(self, output: StepOutput | Exception) -> None:
        if not self._run.complete and self._shadows.is_in_the_way():
            self.end()

    def _ended(self) -> None:
        self._shadows.forget(self)
        self._compare()

    def _compare(self) -> None:
        with self._lock:
            incumbent = self._incumbent
            if self._compared or self._over or incumbent is None or not (incumbent.complete and self._run.complete):
                return
            self._compared = True
        record = ShadowRecord.of(
            incumbent.token_ids,
            self._run.token_ids,
            incumbent_s_per_token=incumbent.seconds_per_token,
            candidate_s_per_token=self._run.seconds_per_token,
        )
        self._outcomes.record_shadow(self._rollout_ids, record)
