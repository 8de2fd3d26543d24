"""Schedules the sequences of the next step."""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from echovlm_ray.engine.block_pool import BLOCK_SIZE, BlockContents, BlockPool
from echovlm_ray.engine.fairness import TURN_LEAD, ServiceCounters
from echovlm_ray.engine.sequence import Sequence
from echovlm_ray.engine.turns import Turns
from echovlm_ray.errors import OverloadedError
from router.errors import ExpertsUnavailableError

# Prefill tokens of background requests in a step with other requests, which makes the step only a little longer.
BACKGROUND_PREFILL_TOKENS = BLOCK_SIZE
# For this long after several callers were active, a single active caller gets this part of a step's prefill budget, so
# that the next prompt of another caller does not wait for a long step.
SHARED_S = 10.0
SHARED_PREFILL = 4
# A prompt of up to this many tokens is computed without the others' tokens, if its caller has the smaller part of the
# batch.
SHORT_PROMPT_TOKENS = 128
# Prefill tokens per step of a caller that was served more than another one with a decoding sequence.
AHEAD_PREFILL_TOKENS = 2 * BLOCK_SIZE
# While a sequence waits for more blocks than are free, short sequences may overtake it for this long: those that need
# at most this part of the cache, one for each caller without a running one.
PASSED_S = 30.0
SHORT = 32

# Returns, without blocking, why a sequence's experts are unavailable now, or None.
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
    """Continuous batching: every step has all decoding sequences, then as much prefill as the budget allows.

    First come, first served: a sequence is admitted when the cache has blocks for its tokens, and gets further blocks
    as it grows. If none is free then, the last admitted sequence is preempted and returns to the front of the queue, so
    the oldest always advances and all sequences finish. Background sequences have the lowest priority: they are last in
    a step, with a small piece of their prompts, are preempted first, and return to the end of the queue.

    With several callers, this holds for the sequences of each. Among callers, the one that was served least is first:
    to be admitted, for which a caller with more sequences in the batch or more blocks is preempted, and in prefill, of
    which a step computes that of one caller only, so that short prompts are not computed beside long ones of others.
    A short prompt of that caller is computed without the others' tokens if those are more, in every other step at most,
    so that its first token does not wait for a whole batch. With more callers than places, their sequences take turns,
    see `engine.turns`.

    A sequence whose experts do not answer is stalled: it does not count in the batch and is preempted before others, so
    that a lost organ does not delay other organs' requests. Tokens whose blocks were freed are recomputed.

    The prompts of a caller that was served more than another one with a decoding sequence are computed in small pieces,
    so that steps are short.

    While the next sequence waits for cache blocks, short ones of other callers may overtake it for a time.
    """

    def __init__(
        self,
        pool: BlockPool,
        unavailable: Unavailable,
        *,
        max_batch_size: int,
        max_queue: int,
        max_prefill_tokens: int,
        prefix_reuse: bool = True,
    ) -> None:
        assert max_prefill_tokens >= BLOCK_SIZE, "a prompt of more than a block would never be computed"
        self.pool = pool
        self.unavailable = unavailable
        self.max_batch_size = max_batch_size
        self.max_queue = max_queue
        self.max_prefill_tokens = max_prefill_tokens
        self.prefix_reuse = prefix_reuse
        self._callers = ServiceCounters()
        self.turns = Turns()
        self._shared_until = -math.inf
        # Whether the last step had only one caller while others were ready.
        self._was_exclusive = False
        # In the order of arrival; preempted ones are the oldest, and in front.
        self.waiting: deque[Sequence] = deque()
        # In the order of admission, which is the order of arrival; includes stalled ones.
        self.running: list[Sequence] = []
        # Counters since the start: tokens found in the prefix cache, and preemptions.
        self.prefix_hits = 0
        self.preemptions = 0
        # The sequence that waits for blocks, and until when others may overtake it.
        self._passed: Sequence | None = None
        self._passed_until = -math.inf

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
        if not sequence.request.background:
            self._callers.join(sequence.request.caller)

    def finish(self, sequence: Sequence) -> bool:
        """Removes a sequence and frees its blocks. False, without effect, if it was removed before."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            return False
        self._free_blocks(sequence)
        if not sequence.request.background:
            self._callers.leave(sequence.request.caller)
        return True

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step: the caller that was served least first, then by arrival."""
        now = time.monotonic()
        ready = self._ready(self.running, now)
        self._admit(ready, now)
        budget = self.max_prefill_tokens
        if self._callers.num_active > 1:
            self._shared_until = now + SHARED_S
        elif now < self._shared_until:
            budget = max(BLOCK_SIZE, budget // SHARED_PREFILL)
        prefilling: bytes | None = None
        chunks: list[Chunk] = []
        turn = ready
        if len({_owner(sequence) for sequence in ready}) > 1:
            ready.sort(key=self._order)
            turn = self._turn(ready, budget)
        else:
            self._was_exclusive = False
        for sequence in turn:
            if sequence.request.background and chunks and not chunks[-1].sequence.request.background:
                budget = min(budget, BACKGROUND_PREFILL_TOKENS)
            if len(chunks) == self.max_batch_size:
                break
            # Without blocks it is waiting, or was just preempted by an older one.
            if not sequence.block_table:
                continue
            end = len(sequence.token_ids)
            caller = sequence.request.caller
            if sequence.num_pending > 1:
                if prefilling not in (None, caller):
                    continue
                if prefilling is None and self._is_ahead(sequence, ready):
                    budget = min(budget, AHEAD_PREFILL_TOKENS)
                end = self._cut(sequence, budget)
            count = end - sequence.num_computed
            if not count or not self._grow(sequence, end, ready, chunks):
                continue
            if count > 1:
                budget -= count
                prefilling = caller
            chunks.append(Chunk(sequence, sequence.num_computed, end))
        self._charge(chunks)
        return chunks

    def _charge(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            own = chunk.sequence
            # What is computed again is no service to the caller.
            count = chunk.end - max(chunk.start, own.num_served)
            if count > 0 and not own.request.background:
                self._callers.charge(own.request.caller, count)
            own.num_served = max(own.num_served, chunk.end)
        self.turns.computed(sum(chunk.end - chunk.start for chunk in chunks))
        if self._was_exclusive and chunks:
            # It delayed the others by the time of reading the weights, for any number of tokens.
            self._callers.charge(chunks[0].sequence.request.caller, BLOCK_SIZE)

    def _turn(self, ready: list[Sequence], budget: int) -> list[Sequence]:
        """The sequences of the next step: only the first caller's, if the step is for a short prompt of it.

        Not for a caller with as many sequences as all others, which would gain little.
        """
        own = [sequence for sequence in ready if _owner(sequence) == _owner(ready[0])]
        prompts = (sequence for sequence in own if sequence.num_pending > 1 and not sequence.num_generated)
        prompt = next((sequence for sequence in prompts if sequence.block_table), None)
        fits = prompt is not None and prompt.num_pending <= min(budget, SHORT_PROMPT_TOKENS)
        self._was_exclusive = fits and len(own) < len(ready) - len(own) and not self._was_exclusive
        return own if self._was_exclusive else ready

    def _cut(self, sequence: Sequence, budget: int) -> int:
        """The end of a sequence's chunk in a step, within a budget.

        A multiple of whole blocks, unless the sequence ends: then attention has the same tiles for any chunking of a
        prompt.
        """
        end = min(len(sequence.token_ids), sequence.num_computed + budget)
        if end < len(sequence.token_ids):
            end -= end % BLOCK_SIZE
        return max(end, sequence.num_computed)

    def _is_ahead(self, sequence: Sequence, ready: Iterable[Sequence]) -> bool:
        """Whether a sequence's caller was served more than another one with a decoding sequence."""
        if self._callers.num_active == 1 or sequence.request.background:
            return False
        decoding = (other for other in ready if other.num_pending == 1 and other.block_table)
        callers = {other.request.caller for other in decoding if not other.request.background}
        return self._callers.is_ahead(sequence.request.caller, callers)

    def publish(self, sequence: Sequence) -> None:
        """Makes a sequence's full blocks available in the prefix cache. Call it when its logits were finite."""
        full = sequence.num_computed // BLOCK_SIZE
        if not self.prefix_reuse or full == sequence.num_published:
            return
        keys = sequence.prefix.first(full, sequence.token_ids)
        bundles = frozenset(member.bundle_digest for member in sequence.experts)
        for index in range(sequence.num_published, len(keys)):
            contents = BlockContents(keys[index], bundles, sequence.block_pairs[index])
            self.pool.publish(sequence.block_table[index], contents)
        sequence.num_published = full

    def overflow(self) -> list[Sequence]:
        """The latest stalled sequences beyond `max_queue`, which must be ended."""
        if len(self.running) <= self.max_queue:
            return []
        stalled = [sequence for sequence in self.running if sequence.stalled_by]
        return stalled[self.max_queue :]

    def next_retry(self) -> float | None:
        """When the first stalled sequence may run again, in `time.monotonic` seconds; None if none is stalled."""
        return min((sequence.retry_at for sequence in self.running if sequence.stalled_by), default=None)

    def _ready(self, sequences: Iterable[Sequence], now: float) -> list[Sequence]:
        """The sequences whose experts are available; stalls the others."""
        ready = []
        asked: dict[tuple[str, object], ExpertsUnavailableError | None] = {}
        for sequence in sequences:
            if sequence.retry_at > now:
                continue
            experts = (sequence.request.expert_set_id, sequence.request.shares)
            if experts not in asked:
                asked[experts] = self.unavailable(sequence)
            if (error := asked[experts]) is None:
                ready.append(sequence)
            else:
                sequence.stall(error, now)
        return ready

    def _admit(self, ready: list[Sequence], now: float) -> None:
        # Sequences that lost their blocks while stalled are older than all waiting ones.
        for sequence in ready:
            if not sequence.block_table and not self._take_blocks(sequence, ready):
                return
        while self.waiting:
            sequence = self._next_waiting()
            if not self._admit_one(sequence, ready, now):
                self._let_past(sequence, ready, now)
                return

    def _admit_one(self, sequence: Sequence, ready: list[Sequence], now: float) -> bool:
        if len(ready) >= self.max_batch_size and not self._make_place(sequence, ready):
            return False
        if self._ready([sequence], now):
            while not self._take_blocks(sequence, ready):
                if not self._make_blocks(sequence, ready):
                    return False
            ready.append(sequence)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.num_generated_before = sequence.num_generated
        return True

    def _let_past(self, first: Sequence, ready: list[Sequence], now: float) -> None:
        """Admits short sequences of other callers while the first one waits, for a limited time."""
        if self._callers.num_active == 1:
            return
        if first is not self._passed:
            self._passed, self._passed_until = first, now + PASSED_S
        if now > self._passed_until:
            return
        seen = {_owner(other) for other in (first, *self.running)}
        for sequence in tuple(self.waiting):
            caller = _owner(sequence)
            if caller is None or caller in seen:
                continue
            seen.add(caller)
            if BlockPool.blocks_for(sequence.max_tokens) <= self.pool.num_blocks // SHORT:
                self._admit_one(sequence, ready, now)

    def _next_waiting(self) -> Sequence:
        # The usual case, checked first in every step with a full batch.
        if self._callers.num_active == 1 and not self.waiting[0].request.background:
            return self.waiting[0]
        return min(self.waiting, key=self._order)

    def _order(self, sequence: Sequence) -> tuple[bool, float, int]:
        """Sorts sequences by the fair order of their callers; stable for each caller."""
        if sequence.request.background:
            return True, 0.0, 0
        return False, *self._callers.priority(sequence.request.caller)

    def _make_place(self, sequence: Sequence, ready: list[Sequence]) -> bool:
        """Preempts a sequence of the caller with the most in the batch, if it then still has as many as this one's.

        Or else, for a caller that has none, one that has had its turn.
        """
        if not self._may_preempt(sequence, ready) or self.unavailable(sequence) is not None:
            return False
        places = Counter(_owner(other) for other in ready)
        own = places[_owner(sequence)]
        return self._preempt_for(sequence, ready, places, own + 2) or (not own and self._end_turn(sequence, ready))

    def _end_turn(self, sequence: Sequence, ready: list[Sequence]) -> bool:
        """Preempts the sequence of the caller that was served most, if it is ahead, had its turn, and makes room."""
        needed = BlockPool.blocks_for(len(sequence.token_ids)) + len(ready)
        leads = {other: self._callers.lead(other.request.caller, sequence.request.caller) for other in ready}
        ahead = [
            other
            for other in ready
            if leads[other] >= TURN_LEAD
            and self.turns.is_over(other)
            and self.pool.num_free + len(other.block_table) >= needed
        ]
        if not ahead:
            return False
        # If there is room for all that has begun, also when the batch has become as long as it can, it stays cached.
        begun = [len(other.token_ids) for other in self.waiting if other.num_served and other is not sequence]
        held = sum(map(BlockPool.blocks_for, begun)) + sum(BlockPool.blocks_for(other.max_tokens) for other in ready)
        fits = self.prefix_reuse and held + needed <= self.pool.num_blocks
        for victim in sorted(ahead, key=lambda other: -leads[other]):
            if self.turns.end(victim, is_kept=fits and not victim.request.return_logits):
                self._preempt(victim)
                ready.remove(victim)
                return True
        return False

    def _make_blocks(self, sequence: Sequence, ready: list[Sequence]) -> bool:
        """Preempts a sequence of the caller with the most blocks, if it has more than an equal share."""
        if not self._may_preempt(sequence, ready):
            return False
        share = self.pool.num_blocks // max(1, self._callers.num_active)
        blocks: Counter[bytes | None] = Counter()
        for other in self.running:
            blocks[_owner(other)] += len(other.block_table)
        if blocks[_owner(sequence)] + BlockPool.blocks_for(len(sequence.token_ids)) > share:
            return False
        return self._preempt_for(sequence, ready, blocks, share + 1)

    def _may_preempt(self, sequence: Sequence, ready: list[Sequence]) -> bool:
        """Whether sequences could be preempted for this one; a cheap check for the usual case of one caller."""
        if sequence.request.background:
            return False
        return self._callers.num_active > 1 or any(other.request.background for other in ready)

    def _preempt_for(self, sequence: Sequence, ready: list[Sequence], held: Counter[bytes | None], least: int) -> bool:
        """Preempts the latest background sequence, or else one of the caller with the most, if that is at least this
        much.

        Never a caller's only one, whose computed tokens would be lost repeatedly.
        """
        latest = ready[::-1]
        victim = next((other for other in latest if other.request.background), None)
        if victim is None:
            caller = max((_owner(other) for other in ready), key=lambda other: held[other], default=None)
            own = [other for other in latest if _owner(other) == caller]
            if len(own) < 2 or caller == _owner(sequence) or held[caller] < least:
                return False
            victim = own[0]
        self._preempt(victim)
        ready.remove(victim)
        return True

    def _take_blocks(self, sequence: Sequence, ready: list[Sequence]) -> bool:
        """Allocates blocks for all tokens of a sequence, reusing those of a cached prefix. False if there are not
        enough.
        """
        reused = self._reusable(sequence)
        needed = BlockPool.blocks_for(len(sequence.token_ids)) - len(reused)
        # One more for each other sequence that may grow, which would otherwise preempt this one immediately.
        spare = sum(0 < len(other.block_table) < BlockPool.blocks_for(other.max_tokens) for other in ready)
        holders = [holder for holder in self.running if holder.block_table and holder not in ready]
        given = sum(len(holder.block_table) for holder in holders)
        if self.pool.num_free_without(reused) + given < needed + spare:
            return False
        self.pool.acquire(reused)
        while self.pool.num_free < needed + spare and holders:
            # The latest is preempted first, because it has the least to recompute.
            self._free_blocks(holders.pop())
        # Shared blocks do not become free.
        blocks = self.pool.allocate(needed) if self.pool.num_free >= needed + spare else None
        if blocks is None:
            self.pool.release(reused)
            return False
        sequence.reuse(reused, [dict(self.pool.contents(block).routed_pairs) for block in reused])
        sequence.block_table = [*reused, *blocks]
        self.prefix_hits += len(reused) * BLOCK_SIZE
        if sequence.num_served:
            self.turns.resume(sequence)
        return True

    def _reusable(self, sequence: Sequence) -> list[int]:
        # For the logits of all tokens, all tokens must be computed.
        if not self.prefix_reuse or sequence.request.return_logits:
            return []
        # Never the last token, because its logits are needed.
        full = (len(sequence.token_ids) - 1) // BLOCK_SIZE
        return self.pool.find(sequence.prefix.first(full, sequence.token_ids))

    def _grow(self, sequence: Sequence, num_tokens: int, ready: list[Sequence], chunks: list[Chunk]) -> bool:
        """Allocates blocks for a running sequence's tokens. False if the sequence was preempted instead."""
        while (missing := BlockPool.blocks_for(num_tokens) - len(sequence.block_table)) > 0:
            if (blocks := self.pool.allocate(missing)) is not None:
                sequence.block_table += blocks
                return True
            taking_part = [chunk.sequence for chunk in chunks]
            holders = [holder for holder in self.running if holder.block_table and holder not in taking_part]
            holders.sort(key=_in_background)
            stalled = [holder for holder in holders if holder not in ready]
            if stalled:
                self._free_blocks(stalled[-1])
                continue
            self._preempt(holders[-1])
            if holders[-1] is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._free_blocks(sequence)
        self.running.remove(sequence)
        if sequence.request.background:
            self.waiting.append(sequence)
        else:
            self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _free_blocks(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.reset_computed()


def _owner(sequence: Sequence) -> bytes | None:
    return None if sequence.request.background else sequence.request.caller


def _in_background(sequence: Sequence) -> bool:
    return sequence.request.background
