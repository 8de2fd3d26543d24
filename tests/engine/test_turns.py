"""More callers than places in the batch: sequences take turns, and what that costs is bounded."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echovlm_ray.engine import scheduler as scheduler_module
from echovlm_ray.engine.block_pool import BLOCK_SIZE
from echovlm_ray.engine.fairness import DECODED_TOKEN, TURN_LEAD
from echovlm_ray.engine.scheduler import Scheduler
from echovlm_ray.engine.sequence import Sequence
from echovlm_ray.engine.turns import MAX_SAVED, RECOMPUTED_PART, TURN_TOKENS, Turns
from tests.engine.test_fairness import prompt
from tests.engine.test_scheduler import Memory, advance, check, scheduler

LONG = 3000


def callers(
    count: int, *, num_blocks: int = 4000, length: int = 40, prefix_reuse: bool = True, batch: int = 4
) -> tuple[Scheduler, list[Sequence]]:
    """A scheduler with four places, and callers with one long answer each."""
    planned = scheduler(num_blocks, batch=batch, queue=80, prefill=64, prefix_reuse=prefix_reuse)
    own = [prompt(b"%d" % index, length, index, max_new_tokens=LONG) for index in range(count)]
    for each in own:
        planned.add(each)
    return planned, own


def run(planned: Scheduler, steps: int) -> tuple[int, int]:
    """Computes steps; how many tokens there were in all, and how many of them had been computed before."""
    total = again = 0
    for _ in range(steps):
        chunks = planned.schedule()
        total += sum(chunk.end - chunk.start for chunk in chunks)
        again += sum(chunk.end - chunk.start - 1 for chunk in chunks if chunk.sequence.num_generated)
        advance(planned, chunks)
    return total, again


def test_a_newcomer_does_not_wait_until_a_long_answer_ends() -> None:
    planned, own = callers(4)
    run(planned, 200)
    assert all(each.num_generated > 150 for each in own)
    newcomer = prompt(b"new", 20, 100, max_new_tokens=8)
    planned.add(newcomer)
    run(planned, int(TURN_LEAD / DECODED_TOKEN) + 1)
    assert newcomer.num_generated
    assert planned.preemptions == 1
    run(planned, 12)
    # The one that made room goes on where it was.
    assert all(each in planned.running for each in own)
    assert planned.preemptions == 1


def test_a_newcomer_waits_no_longer_than_a_turn() -> None:
    planned, _ = callers(4)
    run(planned, 6)
    newcomer = prompt(b"new", 20, 100)
    planned.add(newcomer)
    run(planned, TURN_TOKENS - 10)
    assert not planned.preemptions, "a sequence lost its place at once"
    run(planned, 20)
    assert newcomer.num_generated


def test_all_callers_advance_alike() -> None:
    planned, own = callers(7)
    run(planned, 1500)
    made = [each.num_generated for each in own]
    assert max(made) - min(made) <= 2 * TURN_TOKENS
    assert min(made) > 600


@pytest.mark.parametrize("prefix_reuse", [True, False])
def test_what_turns_cost_is_bounded(prefix_reuse: bool) -> None:
    planned, own = callers(8, prefix_reuse=prefix_reuse, length=300)
    before = dict.fromkeys(own, 0)
    total = again = 0
    for _ in range(2000):
        running = list(planned.running)
        counted, counted_again = run(planned, 1)
        total, again = total + counted, again + counted_again
        for each in running:
            if each in planned.waiting:
                # In this turn, the step's own token included.
                assert each.num_generated - before[each] >= TURN_TOKENS
                before[each] = each.num_generated
    assert planned.preemptions > 5
    assert again <= MAX_SAVED + total * RECOMPUTED_PART
    if prefix_reuse:
        assert again <= BLOCK_SIZE * planned.preemptions


def test_without_turns_a_newcomer_waits() -> None:
    planned, own = callers(4)
    planned.turns = Turns(float("inf"))
    newcomer = prompt(b"new", 20, 100)
    planned.add(newcomer)
    run(planned, 1000)
    assert not newcomer.num_generated
    assert all(each.num_generated > 900 for each in own)


def test_callers_that_share_a_place_by_turns_are_charged_for_what_is_new_to_them_alone() -> None:
    planned, own = callers(6, prefix_reuse=False)
    run(planned, 1000)
    assert planned.preemptions
    for each in own:
        # The latest token is not computed yet.
        computed = max(each.num_served - each.num_prompt, 0)
        extra = planned._callers._served[each.request.caller] - each.num_prompt - computed * DECODED_TOKEN
        # A short prompt may have had a step of its own.
        assert extra in (0, BLOCK_SIZE)


ASKED = st.tuples(st.sampled_from([b"a", b"b", b"c", b"d"]), st.integers(1, 100), st.integers(1, 60))


@settings(deadline=None, max_examples=60)
@given(st.lists(ASKED, min_size=1, max_size=12), st.sampled_from([12, 40]), st.booleans())
def test_short_turns_lose_no_block_and_everything_ends(
    asked: list[tuple[bytes, int, int]], num_blocks: int, prefix_reuse: bool
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scheduler_module, "TURN_LEAD", 1.0)
        planned = scheduler(num_blocks, batch=2, queue=80, prefill=32, prefix_reuse=prefix_reuse)
        planned.turns = Turns(2)
        memory = Memory()
        for index, (caller, count, new) in enumerate(asked):
            planned.add(prompt(caller, count, index, max_new_tokens=new))
        for _ in range(4000):
            if not planned.running and not planned.waiting:
                return
            advance(planned, planned.schedule(), memory)
            check(planned)
    raise AssertionError("a sequence does not end")
