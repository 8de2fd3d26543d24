"""Blocks are neither leaked nor allocated twice, in any sequence of events."""

import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echovlm_ray.engine.block_pool import BLOCK_SIZE, BlockPool
from echovlm_ray.engine.kv_cache import KVCache
from echovlm_ray.engine.scheduler import Chunk, Scheduler
from echovlm_ray.engine.sequence import Sequence, SequenceRequest
from echovlm_ray.errors import OverloadedError
from router.errors import ExpertsUnavailableError
from router.gating.expert_set import ExpertSetMember

ORGANS = ("breast", "liver")


def start(request: SequenceRequest) -> Sequence:
    experts = tuple(ExpertSetMember(organ=organ, bundle_digest=f"{organ}-1") for organ, _ in request.shares)
    return Sequence.start(request, lambda output: None, experts)


def sequence(
    num_prompt: int,
    max_new_tokens: int,
    organ: str = "breast",
    first_token: int = 0,
    background: bool = False,
    caller: bytes = b"",
) -> Sequence:
    request = SequenceRequest(
        input_ids=tuple(range(first_token, first_token + num_prompt)),
        position_ids_3T=torch.zeros(3, num_prompt, dtype=torch.int64),
        position_delta=0,
        expert_set_id="set",
        shares=((organ, 1.0),),
        max_new_tokens=max_new_tokens,
        caller=caller,
        background=background,
    )
    return start(request)


class Outage:
    """Organs that do not answer now."""

    def __init__(self) -> None:
        self.organs: set[str] = set()

    def __call__(self, own: Sequence) -> ExpertsUnavailableError | None:
        organ = own.request.shares[0][0]
        return ExpertsUnavailableError(organ, "gone") if organ in self.organs else None


def scheduler(
    num_blocks: int = 20,
    outage: Outage | None = None,
    *,
    batch: int = 4,
    queue: int = 8,
    prefill: int = 32,
    prefix_reuse: bool = True,
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks),
        outage or Outage(),
        max_batch_size=batch,
        max_queue=queue,
        max_prefill_tokens=prefill,
        prefix_reuse=prefix_reuse,
    )


class Memory:
    """What a real cache would hold: for every slot, what the token's keys and values were computed from."""

    def __init__(self) -> None:
        self.slots: dict[int, object] = {}

    def compute(self, chunk: Chunk) -> None:
        own = chunk.sequence
        for index in range(chunk.end):
            slot = own.block_table[index // BLOCK_SIZE] * BLOCK_SIZE + index % BLOCK_SIZE
            source = (own.request.shares, hash(tuple(own.token_ids[: index + 1])))
            if index < chunk.start:
                assert self.slots[slot] == source, "a sequence sees what was computed for another"
            else:
                self.slots[slot] = source


def advance(planned: Scheduler, chunks: list[Chunk], memory: Memory | None = None) -> None:
    """What the engine does with the chunks of a step that worked."""
    for chunk in chunks:
        own = chunk.sequence
        if memory is not None:
            memory.compute(chunk)
        own.resume()
        num_blocks = (chunk.end - 1) // BLOCK_SIZE - chunk.start // BLOCK_SIZE + 1
        own.add_computed(chunk.end, [{}] * num_blocks)
        if chunk.reaches_last_token:
            planned.publish(own)
            own.token_ids.append(7 * len(own.token_ids) % 3)
            if own.num_generated >= own.request.max_new_tokens:
                planned.finish(own)


def check(planned: Scheduler) -> None:
    pool = planned.pool
    holders = Counter(block for own in planned.running for block in own.block_table)
    assert [holders[block] for block in range(pool.num_blocks)] == pool._ref_counts
    assert sorted([*holders, *pool._free, *pool._cached]) == list(range(pool.num_blocks))
    assert not any(own.block_table for own in planned.waiting)
    for own in planned.running:
        assert len(own.block_table) == len(set(own.block_table))
        assert len(own.block_table) * BLOCK_SIZE >= own.num_computed
        assert all(holders[block] == 1 for block in own.block_table[own.num_computed // BLOCK_SIZE :])


actions = st.one_of(
    st.tuples(
        st.just("add"),
        st.integers(1, 100),
        st.integers(1, 40),
        st.sampled_from(ORGANS),
        st.sampled_from([0, 16]),
        st.booleans(),
        st.sampled_from([b"", b"", b"a", b"b"]),
    ),
    st.tuples(st.just("cancel"), st.integers(0, 50)),
    st.tuples(st.just("step")),
    st.tuples(st.just("fail"), st.integers(0, 50)),
    st.tuples(st.just("outage"), st.sampled_from(ORGANS)),
    st.tuples(st.just("recovery"), st.sampled_from(ORGANS)),
    st.tuples(st.just("forget")),
)


@settings(max_examples=300, deadline=None)
@given(
    script=st.lists(actions, max_size=60),
    num_blocks=st.sampled_from([9, 12, 20]),
    batch=st.integers(1, 5),
    prefix_reuse=st.booleans(),
)
def test_no_block_is_lost_and_everything_ends(
    script: list[tuple[Any, ...]], num_blocks: int, batch: int, prefix_reuse: bool
) -> None:
    outage, memory = Outage(), Memory()
    planned = scheduler(num_blocks, outage, batch=batch, prefix_reuse=prefix_reuse)
    for action, *arguments in script:
        everyone = [*planned.running, *planned.waiting]
        if action == "add":
            try:
                planned.add(sequence(*arguments))
            except OverloadedError:
                assert len(planned.waiting) >= planned.max_queue
        elif action == "cancel" and everyone:
            planned.finish(everyone[arguments[0] % len(everyone)])
        elif action == "outage":
            outage.organs.add(arguments[0])
        elif action == "recovery":
            outage.organs.discard(arguments[0])
        elif action == "forget":
            planned.pool.evict_bundle("breast-1")
        elif action in ("step", "fail"):
            chunks = planned.schedule()
            check(planned)
            assert len(chunks) <= planned.max_batch_size
            assert sum(c.end - c.start for c in chunks if c.end - c.start > 1) <= planned.max_prefill_tokens
            assert all(chunk.reaches_last_token or chunk.end % BLOCK_SIZE == 0 for chunk in chunks)
            assert not any(outage(chunk.sequence) for chunk in chunks)
            if action == "fail" and chunks:
                lost = chunks.pop(arguments[0] % len(chunks))
                lost.sequence.stall(ExpertsUnavailableError("breast", "lost"), time.monotonic() - 10)
            advance(planned, chunks, memory)
        check(planned)
    outage.organs.clear()
    for _ in range(3000):
        if not planned.running and not planned.waiting:
            break
        for own in planned.running:
            own.retry_at = 0.0
        chunks = planned.schedule()
        assert chunks, "nothing advances"
        advance(planned, chunks, memory)
        check(planned)
    assert not planned.running
    assert not planned.waiting
    assert planned.pool.num_free == planned.pool.num_blocks
    assert prefix_reuse or not planned.pool.num_cached
    planned.pool.evict_all()
    assert sorted(planned.pool._free) == list(range(num_blocks))


def test_more_are_admitted_than_could_reach_their_longest_end() -> None:
    planned = scheduler(num_blocks=8, batch=8, prefill=40)
    for _ in range(4):
        planned.add(sequence(10, 100))
    assert len(planned.schedule()) == 4


def test_the_latest_gives_its_blocks_and_goes_on_where_it_was() -> None:
    planned = scheduler(num_blocks=5, batch=3, prefill=100, prefix_reuse=False)
    old, young = sequence(30, 30), sequence(25, 30, first_token=500)
    planned.add(old)
    planned.add(young)
    order = []
    while planned.running or planned.waiting:
        before = len(young.token_ids)
        chunks = planned.schedule()
        order.append([chunk.sequence for chunk in chunks])
        if young in planned.waiting:
            assert len(young.token_ids) == before, "a token was lost"
        advance(planned, chunks)
    assert planned.preemptions
    assert [young.num_generated, old.num_generated] == [30, 30]
    assert all(old in step for step in order[:30]), "the oldest was held up"


def test_one_that_was_sent_back_comes_before_those_that_wait() -> None:
    planned = scheduler(num_blocks=4, batch=2, prefill=100, prefix_reuse=False)
    own = [sequence(31, 20, first_token=100 * number) for number in range(3)]
    planned.add(own[0])
    advance(planned, planned.schedule())
    planned.add(own[1])
    planned.add(own[2])
    ended: list[Sequence] = []
    while planned.running or planned.waiting:
        advance(planned, planned.schedule())
        ended += [each for each in own if each not in ended and each.num_generated == 20]
    assert ended == own


def test_a_longest_request_alone_can_always_finish() -> None:
    planned = scheduler(num_blocks=6, batch=4)
    longest = sequence(16, 81)
    for each in (sequence(40, 30, first_token=300), longest, sequence(40, 30, first_token=600)):
        planned.add(each)
    for _ in range(300):
        advance(planned, planned.schedule())
    assert not planned.running
    assert not planned.waiting
    assert longest.num_generated == 81


def test_a_prompt_begins_with_what_another_left_behind() -> None:
    planned = scheduler(num_blocks=20, prefill=100)
    first, same, longer = sequence(40, 1), sequence(40, 1), sequence(70, 1)
    other_organ = sequence(40, 1, "liver")
    planned.add(first)
    advance(planned, planned.schedule())
    assert planned.pool.num_cached == 2
    spans = []
    for each in (same, longer, other_organ):
        planned.add(each)
        (chunk,) = planned.schedule()
        spans.append((chunk.start, chunk.end))
        advance(planned, [chunk])
    assert spans == [(32, 40), (32, 70), (0, 40)]
    assert planned.prefix_hits == 64


def test_the_last_token_is_always_computed() -> None:
    planned = scheduler(num_blocks=20, prefill=100)
    for start in (0, 16, 16):
        planned.add(sequence(32, 1))
        (chunk,) = planned.schedule()
        assert (chunk.start, chunk.end) == (start, 32)
        advance(planned, [chunk])


def test_an_answer_and_its_prompt_are_where_the_next_turn_begins() -> None:
    planned = scheduler(num_blocks=20, prefill=100)
    first = sequence(20, 20)
    planned.add(first)
    while planned.running or planned.waiting:
        advance(planned, planned.schedule())
    request = replace(
        first.request,
        input_ids=(*first.token_ids, 1, 2, 3),
        position_ids_3T=torch.cat([torch.zeros(3, 20, dtype=torch.int64), torch.arange(20, 43).expand(3, -1)], dim=1),
    )
    planned.add(start(request))
    (chunk,) = planned.schedule()
    # 39 of the 40 tokens were in the cache: two full blocks.
    assert (chunk.start, chunk.end) == (32, 43)


def test_who_wants_logits_computes_everything() -> None:
    planned = scheduler(num_blocks=20, prefill=100)
    planned.add(sequence(40, 1))
    advance(planned, planned.schedule())
    request = replace(sequence(40, 1).request, return_logits=True)
    planned.add(start(request))
    (chunk,) = planned.schedule()
    assert (chunk.start, chunk.end) == (0, 40)


def test_what_was_not_computed_well_is_not_shared() -> None:
    planned = scheduler(num_blocks=20, prefill=32)
    planned.add(sequence(40, 1))
    advance(planned, planned.schedule())
    # Half a prompt, from which no token came yet.
    planned.add(sequence(40, 1))
    chunks = planned.schedule()
    assert [(chunk.start, chunk.end) for chunk in chunks] == [(32, 40), (0, 16)]


def test_prompts_share_the_budget_in_the_order_in_which_they_came() -> None:
    planned = scheduler(num_blocks=100, batch=8, prefill=50, prefix_reuse=False)
    own = [sequence(length, 5, first_token=100 * length) for length in (20, 60, 10, 15)]
    for each in own:
        planned.add(each)
    steps = []
    for _ in range(3):
        chunks = planned.schedule()
        steps.append([(own.index(chunk.sequence), chunk.end - chunk.start) for chunk in chunks])
        advance(planned, chunks)
    # Whole blocks, unless it is all there is.
    assert steps == [[(0, 20), (1, 16), (2, 10)], [(0, 1), (1, 44), (2, 1)], [(0, 1), (1, 1), (2, 1), (3, 15)]]


def test_sequences_of_a_lost_organ_make_room_for_the_others() -> None:
    outage = Outage()
    planned = scheduler(num_blocks=4, outage=outage, batch=2, prefix_reuse=False)
    lost = [sequence(30, 3, "liver") for _ in range(2)]
    for own in lost:
        planned.add(own)
    advance(planned, planned.schedule())
    advance(planned, planned.schedule())
    assert all(own.num_generated for own in lost)
    outage.organs.add("liver")
    other = sequence(30, 1)
    planned.add(other)
    chunks = planned.schedule()
    assert [chunk.sequence for chunk in chunks] == [other], "the batch or the cache was kept by stalled sequences"
    advance(planned, chunks)
    assert [bool(own.block_table) for own in lost] == [True, False], "the latest gives its blocks first"
    outage.organs.clear()
    for own in lost:
        own.retry_at = 0.0
    chunks = planned.schedule()
    assert [(chunk.sequence, chunk.start, chunk.end) for chunk in chunks] == [(lost[0], 31, 32), (lost[1], 0, 31)]


def test_only_so_many_stalled_sequences_are_kept() -> None:
    outage = Outage()
    outage.organs.add("liver")
    planned = scheduler(num_blocks=100, outage=outage, batch=2, queue=3)
    own = [sequence(3, 3, "liver") for _ in range(5)]
    for each in own:
        planned.add(each)
        planned.schedule()
    assert planned.overflow() == own[3:]


def test_decoding_goes_on_beside_a_long_prefill() -> None:
    planned = scheduler(prefill=16)
    short, long = sequence(2, 9), sequence(100, 2)
    planned.add(short)
    advance(planned, planned.schedule())
    planned.add(long)
    spans = []
    for _ in range(3):
        chunks = planned.schedule()
        spans.append([(chunk.sequence is long, chunk.end - chunk.start) for chunk in chunks])
        advance(planned, chunks)
    assert spans == [[(False, 1), (True, 16)]] * 3


def test_a_prompt_in_the_background_is_computed_in_small_pieces_while_others_run() -> None:
    planned = scheduler(num_blocks=100, prefill=64, prefix_reuse=False)
    background, caller = sequence(100, 3, background=True), sequence(70, 3)
    planned.add(background)
    (alone,) = planned.schedule()
    assert (alone.start, alone.end) == (0, 64)
    advance(planned, [alone])
    planned.add(caller)
    steps = []
    for _ in range(4):
        chunks = planned.schedule()
        steps.append([(chunk.sequence is caller, chunk.end - chunk.start) for chunk in chunks])
        advance(planned, chunks)
    # What the caller's prompt leaves of the budget, a block at most, and the rest when the caller has its last token.
    assert steps == [[(True, 64)], [(True, 6), (False, 16)], [(True, 1), (False, 16)], [(True, 1), (False, 4)]]
    assert background.num_generated == 1


def test_the_background_gives_its_blocks_first_and_waits_behind_all() -> None:
    planned = scheduler(num_blocks=5, batch=3, prefill=100, prefix_reuse=False)
    background, old, young = sequence(14, 30, background=True), sequence(30, 20), sequence(25, 20)
    for each in (background, old, young):
        planned.add(each)
    held_up = 0
    while planned.running or planned.waiting:
        chunks = planned.schedule()
        check(planned)
        running = [each for each in (old, young) if each in planned.running]
        held_up += any(each not in [chunk.sequence for chunk in chunks] for each in running)
        if background in planned.waiting:
            assert planned.waiting[-1] is background
        ended = [each for each in (old, young) if each.num_generated == 20]
        assert len(ended) == 2 or background.num_generated < 30
        advance(planned, chunks)
    assert planned.preemptions
    assert not held_up, "a caller's request was held up by one in the background"
    assert [each.num_generated for each in (background, old, young)] == [30, 20, 20]


def test_limits_are_named() -> None:
    planned = scheduler(num_blocks=2, queue=1)
    with pytest.raises(OverloadedError, match=r"33 tokens .* holds 32 \(router.kv_cache_tokens\)"):
        planned.add(sequence(30, 4))
    planned.add(sequence(30, 3))
    with pytest.raises(OverloadedError, match=r"1 requests already wait \(router.max_queue\)"):
        planned.add(sequence(1, 1))


@given(st.permutations(range(6)), st.data())
def test_the_cache_gives_back_what_was_written(table: list[int], data: st.DataObject) -> None:
    cache = KVCache(
        num_layers=2, num_blocks=6, num_key_value_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu")
    )
    end = data.draw(st.integers(1, 6 * BLOCK_SIZE))
    start = data.draw(st.integers(0, end - 1))
    keys_THD = torch.arange(2.0 * end).reshape(end, 1, 2)
    cache.write(1, cache.slots(table, 0, start), keys_THD[:start], -keys_THD[:start])
    cache.write(1, cache.slots(table, start, end), keys_THD[start:], -keys_THD[start:])
    found_keys, found_values = cache.read(1, cache.slots(table, 0, end))
    assert torch.equal(found_keys, keys_THD)
    assert torch.equal(found_values, -keys_THD)
    assert not cache.key_LSHD[0].any()
