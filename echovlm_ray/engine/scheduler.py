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

# Of the prompts of background requests in a step with others: it then takes little longer than without.
BACKGROUND_PREFILL_TOKENS = BLOCK_SIZE
# For so long after several callers were active, a caller that is alone gets this part of the prefill of a step, so that
# the next prompt of another one does not wait for a long step to end.
SHARED_S = 10.0
SHARED_PREFILL = 4
# A prompt of so many tokens is computed without the others' tokens, if its caller has the smaller part of the batch.
SHORT_PROMPT_TOKENS = 128
# Of the prompts of a caller that was served more than another one whose answer is being written, in one step.
AHEAD_PREFILL_TOKENS = 2 * BLOCK_SIZE
# While one waits for more blocks than are free, others are let past it for so long: those that never take more than
# this part of the cache, one of each caller that has none running.
PASSED_S = 30.0
SHORT = 32

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

    First come, first served: a sequence is admitted when the cache has blocks for the tokens it has, and gets further
    ones as it grows. When none is free then, the sequence that was admitted last is preempted: it goes back to the
    front of the queue, so the oldest always advances and everything ends. Sequences in the background come after all
    others: they are the last in a step, of which their prompts get a small piece only, the first to be preempted, and
    go back to the end of the queue.

    With several callers, this holds for the sequences of each. Among callers, the one that was served least is first:
    to be admitted, for which a caller with more sequences in the batch or more blocks is preempted, and in prefill, of
    which a step computes that of one caller only, so that short prompts are not computed beside long ones of others.
    A short prompt of that caller is computed without the others' tokens if those are more, in every other step at most,
    so that its first token does not wait for a whole batch. With more callers than places, their sequences take turns,
    see `engine.turns`.

    A sequence whose experts do not answer is stalled: it counts for nothing in the batch, and is preempted before
    any other, so that a lost organ does not keep the other organs' requests waiting. Tokens whose blocks were
    freed are computed again.

    A caller that was served more than another one whose answers are being written gets small pieces of its prompts
    computed, so that steps are short.

    While the next sequence waits for room in the cache, short ones of other callers are let past it for a time.
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
        # Whether the last step was of one caller alone while others were ready.
        self._was_exclusive = False
        # In the order of arrival; those that were preempted are the oldest, and in front.
        self.waiting: deque[Sequence] = deque()
        # In the order of admission, which is that of arrival; stalled ones included.
        self.running: list[Sequence] = []
        # Since the start: tokens that were not computed because their blocks were there, and sequences sent back.
        self.prefix_hits = 0
        self.preemptions = 0
        # What waits for blocks while others are let past it, and until when they are.
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
        """Removes a sequence and frees its blocks; False, and nothing done, when it is already gone."""
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
        """The chunks of the next step: of the caller that was served least first, each caller's in order of arrival."""
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
            # Without blocks it waits for some, or was just preempted by an older one.
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
            # It kept the others waiting for as long as the weights are read, however few its tokens are.
            self._callers.charge(chunks[0].sequence.request.caller, BLOCK_SIZE)

    def _turn(self, ready: list[Sequence], budget: int) -> list[Sequence]:
        """Those that may take part in the next step: of the first caller alone, if it is for a short prompt of it.

        Not of a caller with as many as all others: it would gain little from their absence.
        """
        own = [sequence for sequence in ready if _owner(sequence) == _owner(ready[0])]
        prompts = (sequence for sequence in own if sequence.num_pending > 1 and not sequence.num_generated)
        prompt = next((sequence for sequence in prompts if sequence.block_table), None)
        fits = prompt is not None and prompt.num_pending <= min(budget, SHORT_PROMPT_TOKENS)
        self._was_exclusive = fits and len(own) < len(ready) - len(own) and not self._was_exclusive
        return own if self._was_exclusive else ready

    def _cut(self, sequence: Sequence, budget: int) -> int:
        """Up to which of its tokens a sequence is computed in a step, within a budget.

        Whole blocks, unless it is all there is: then attention computes the same tiles however a prompt is divided.
        """
        end = min(len(sequence.token_ids), sequence.num_computed + budget)
        if end < len(sequence.token_ids):
            end -= end % BLOCK_SIZE
        return max(end, sequence.num_computed)

    def _is_ahead(self, sequence: Sequence, ready: Iterable[Sequence]) -> bool:
        """Whether a sequence's caller was served more than another one of which a sequence decodes."""
        if self._callers.num_active == 1 or sequence.request.background:
            return False
        decoding = (other for other in ready if other.num_pending == 1 and other.block_table)
        callers = {other.request.caller for other in decoding if not other.request.background}
        return self._callers.is_ahead(sequence.request.caller, callers)

    def publish(self, sequence: Sequence) -> None:
        """Makes a sequence's full blocks available to others; to be called when its logits were finite."""
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
        """The latest stalled sequences beyond `max_queue` of them, which there is no place to keep."""
        if len(self.running) <= self.max_queue:
            return []
        stalled = [sequence for sequence in self.running if sequence.stalled_by]
        return stalled[self.max_queue :]

    def next_retry(self) -> float | None:
        """When the first stalled sequence may run again, in `time.monotonic` seconds; None when nothing is stalled."""
        return min((sequence.retry_at for sequence in self.running if sequence.stalled_by), default=None)

    def _ready(self, sequences: Iterable[Sequence], now: float) -> list[Sequence]:
        """Those whose experts can be reached as far as is known; the others are stalled."""
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
        # Those that lost their blocks while they were stalled are older than all that wait.
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
        """Admits short sequences of other callers while the first one waits, but not for ever."""
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
        # The usual case, which is asked for in every step while a full batch keeps others waiting.
        if self._callers.num_active == 1 and not self.waiting[0].request.background:
            return self.waiting[0]
        return min(self.waiting, key=self._order)

    def _order(self, sequence: Sequence) -> tuple[bool, float, int]:
        """Sorts sequences by the fair order of their callers; those of one caller stay in their order."""
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
        """Preempts a sequence of the caller with the most blocks, if that is more than an equal share of all."""
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
        """Whether there can be sequences that are preempted for this one; cheap, for the usual case of one caller."""
        if sequence.request.background:
            return False
        return self._callers.num_active > 1 or any(other.request.background for other in ready)

    def _preempt_for(self, sequence: Sequence, ready: list[Sequence], held: Counter[bytes | None], least: int) -> bool:
        """Preempts the latest in the background, or else of the caller that holds most if it is at least so much.

        Never a caller's only one: what it computed would be lost again and again.
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
        """Blocks for all tokens that a sequence has, those of a known beginning among them, or False."""
        reused = self._reusable(sequence)
        needed = BlockPool.blocks_for(len(sequence.token_ids)) - len(reused)
        # One more for each of the others that may grow, or the next to do so would send this one back at once.
        spare = sum(0 < len(other.block_table) < BlockPool.blocks_for(other.max_tokens) for other in ready)
        holders = [holder for holder in self.running if holder.block_table and holder not in ready]
        given = sum(len(holder.block_table) for holder in holders)
        if self.pool.num_free_without(reused) + given < needed + spare:
            return False
        self.pool.acquire(reused)
        while self.pool.num_free < needed + spare and holders:
            # The latest gives first: it has the least to compute again.
            self._free_blocks(holders.pop())
        # Blocks that a holder shares with others do not become free.
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
        # The logits of all tokens need all tokens computed.
        if not self.prefix_reuse or sequence.request.return_logits:
            return []
        # Never the last token: the next one is chosen from its logits.
        full = (len(sequence.token_ids) - 1) // BLOCK_SIZE
        return self.pool.find(sequence.prefix.first(full, sequence.token_ids))

    def _grow(self, sequence: Sequence, num_tokens: int, ready: list[Sequence], chunks: list[Chunk]) -> bool:
        """Sees to blocks for a running sequence's tokens; False when it had to give its own instead."""
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
