"""Blocks are neither lost nor given twice, whatever happens to the sequences."""

import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echovlm_ray.engine.kv_cache import BLOCK_SIZE, BlockPool, KVCache
from echovlm_ray.engine.scheduler import Chunk, Scheduler
from echovlm_ray.engine.sequence import Sequence, SequenceRequest
from echovlm_ray.errors import OverloadedError
from router.errors import ExpertsUnavailableError

ORGANS = ("breast", "liver")


def sequence(num_prompt: int, max_new_tokens: int, organ: str = "breast") -> Sequence:
    request = SequenceRequest(
        input_ids=tuple(range(num_prompt)),
        position_ids_3T=torch.zeros(3, num_prompt, dtype=torch.int64),
        position_delta=0,
        expert_set_id="set",
        shares=((organ, 1.0),),
        max_new_tokens=max_new_tokens,
    )
    return Sequence.start(request, lambda output: None)


class Outage:
    """Organs that do not answer now."""

    def __init__(self) -> None:
        self.organs: set[str] = set()

    def __call__(self, own: Sequence) -> ExpertsUnavailableError | None:
        organ = own.request.shares[0][0]
        return ExpertsUnavailableError(organ, "gone") if organ in self.organs else None


def scheduler(
    num_blocks: int = 20, outage: Outage | None = None, *, batch: int = 4, queue: int = 8, prefill: int = 32
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks), outage or Outage(), max_batch_size=batch, max_queue=queue, max_prefill_tokens=prefill
    )


def advance(planned: Scheduler, chunks: list[Chunk]) -> None:
    """What the engine does with the chunks of a step that worked."""
    for chunk in chunks:
        own = chunk.sequence
        own.resume()
        own.num_computed = chunk.end
        if chunk.reaches_last_token:
            own.token_ids.append(0)
            if own.num_generated >= own.request.max_new_tokens:
                planned.finish(own)


def check(planned: Scheduler) -> None:
    held = [block for own in planned.running for block in own.block_table]
    assert sorted(held + planned.pool._free) == list(range(planned.pool.num_blocks))
    assert not any(own.block_table for own in planned.waiting)
    for own in planned.running:
        assert not own.block_table or len(own.block_table) * BLOCK_SIZE >= own.max_tokens
        assert own.block_table or own.num_computed == 0


actions = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 100), st.integers(1, 20), st.sampled_from(ORGANS)),
    st.tuples(st.just("cancel"), st.integers(0, 50)),
    st.tuples(st.just("step")),
    st.tuples(st.just("fail"), st.integers(0, 50)),
    st.tuples(st.just("outage"), st.sampled_from(ORGANS)),
    st.tuples(st.just("recovery"), st.sampled_from(ORGANS)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(actions, max_size=60))
def test_no_block_is_lost_and_everything_ends(script: list[tuple[Any, ...]]) -> None:
    outage = Outage()
    planned = scheduler(outage=outage)
    for action, *arguments in script:
        everyone = [*planned.running, *planned.waiting]
        if action == "add":
            try:
                planned.add(sequence(*arguments))
            except OverloadedError:
                assert len(planned.waiting) == planned.max_queue
        elif action == "cancel" and everyone:
            planned.finish(everyone[arguments[0] % len(everyone)])
        elif action == "outage":
            outage.organs.add(arguments[0])
        elif action == "recovery":
            outage.organs.discard(arguments[0])
        elif action in ("step", "fail"):
            chunks = planned.schedule()
            check(planned)
            assert len(chunks) <= planned.max_batch_size
            assert sum(c.end - c.start for c in chunks if c.end - c.start > 1) <= planned.max_prefill_tokens
            assert not any(outage(chunk.sequence) for chunk in chunks)
            if action == "fail" and chunks:
                lost = chunks.pop(arguments[0] % len(chunks))
                lost.sequence.stall(ExpertsUnavailableError("breast", "lost"), time.monotonic() - 10)
            advance(planned, chunks)
        check(planned)
    outage.organs.clear()
    for _ in range(3000):
        if not planned.running and not planned.waiting:
            break
        for own in planned.running:
            own.retry_at = 0.0
        advance(planned, planned.schedule())
    assert not planned.running
    assert not planned.waiting
    assert planned.pool.num_free == planned.pool.num_blocks


def test_sequences_of_a_lost_organ_make_room_for_the_others() -> None:
    outage = Outage()
    planned = scheduler(num_blocks=4, outage=outage, batch=2)
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


def test_limits_are_named() -> None:
    planned = scheduler(num_blocks=2, queue=1)
    with pytest.raises(OverloadedError, match=r"33 tokens .* holds 32 \(router.kv_cache_tokens\)"):
        planned.add(sequence(30, 4))
    planned.add(sequence(30, 3))
    with pytest.raises(OverloadedError, match=r"1 requests already wait \(router.max_queue\)"):
        planned.add(sequence(1, 1))


def test_a_released_block_cannot_be_released_again() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    assert blocks is not None
    assert pool.allocate(1) is None
    pool.release(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.release(blocks)


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
