"""Callers share the engine: one with many long prompts does not block the others, and is not starved either."""

from hypothesis import given, settings
from hypothesis import strategies as st

from echovlm_ray.engine.fairness import DECODED_TOKEN, MAX_CREDIT, ServiceCounters
from echovlm_ray.engine.scheduler import AHEAD_PREFILL_TOKENS, PASSED_S, SHARED_S, Scheduler
from echovlm_ray.engine.sequence import Sequence
from tests.engine.test_scheduler import Outage, advance, scheduler, sequence

FLOOD, OTHER = b"flood", b"other"


def prompt(caller: bytes, num_prompt: int, index: int = 0, *, max_new_tokens: int = 8) -> Sequence:
    return sequence(num_prompt, max_new_tokens, first_token=1000 * index, caller=caller)


def flooded(num_blocks: int = 2000, *, batch: int = 4, length: int = 300, outage: Outage | None = None) -> Scheduler:
    """A scheduler in which one caller has 60 prompts, some of which decode."""
    planned = scheduler(num_blocks, outage, batch=batch, queue=80, prefill=64, prefix_reuse=False)
    for index in range(60):
        planned.add(prompt(FLOOD, length, index, max_new_tokens=40))
    for _ in range(batch * length // 64 + 4):
        advance(planned, planned.schedule())
    return planned


def step(planned: Scheduler) -> list[tuple[bytes, int]]:
    """Computes a step: caller and number of tokens of every chunk."""
    chunks = planned.schedule()
    advance(planned, chunks)
    return [(chunk.sequence.request.caller, chunk.end - chunk.start) for chunk in chunks]


def test_a_short_prompt_is_computed_in_a_step_of_its_own_whatever_another_caller_asked() -> None:
    planned = flooded()
    planned.add(prompt(OTHER, 20))
    assert step(planned) == [(OTHER, 20)]
    chunks = step(planned)
    assert len(chunks) == 4
    assert (OTHER, 1) in chunks
    assert chunks.count((FLOOD, 1)) >= 2


def test_short_prompts_take_at_most_every_other_step() -> None:
    planned = flooded(batch=8)
    alone = 0
    steps = 100
    for index in range(steps):
        planned.add(prompt(OTHER, 20, 100 + index, max_new_tokens=1))
        alone += all(caller == OTHER for caller, _ in step(planned))
    assert 1 < alone <= steps // 2


def test_a_prompt_that_does_not_fit_into_a_step_is_computed_beside_the_others() -> None:
    planned = flooded()
    planned.add(prompt(OTHER, 200))
    chunks = step(planned)
    assert chunks[0] == (OTHER, 64)
    assert all(chunk == (FLOOD, 1) for chunk in chunks[1:]), "a long prompt was computed beside it"
    assert len(chunks) == 4


def test_a_full_cache_makes_room_for_a_short_prompt() -> None:
    planned = flooded(num_blocks=80)
    assert planned.pool.num_free < 20
    planned.add(prompt(OTHER, 200))
    assert (OTHER, 64) in step(planned)
    assert planned.preemptions == 1


def test_more_than_an_equal_share_of_the_cache_is_waited_for() -> None:
    planned = flooded(num_blocks=80)
    own = prompt(OTHER, 900)
    planned.add(own)
    for _ in range(3000):
        step(planned)
        if own.num_generated:
            break
    assert own.num_generated
    # One made its place in the batch; the blocks came from those that ended.
    assert planned.preemptions == 1


def filled() -> tuple[Scheduler, Sequence]:
    """A scheduler whose cache six callers fill, and a sequence that waits for more of it than is its caller's share."""
    planned = scheduler(256, batch=16, queue=80, prefill=64, prefix_reuse=False)
    for index in range(24):
        planned.add(prompt(b"%d" % (index % 6), 200, index, max_new_tokens=200))
    for _ in range(80):
        step(planned)
    large = prompt(FLOOD, 2000, 100)
    planned.add(large)
    step(planned)
    assert planned.waiting[0] is not large
    assert large in planned.waiting
    return planned, large


def test_a_short_prompt_does_not_wait_for_a_long_one_that_the_cache_has_no_room_for() -> None:
    planned, large = filled()
    planned.add(prompt(OTHER, 20))
    assert (OTHER, 20) in step(planned)
    # The next one of this caller, whose first one runs, and what is not short, are not let past.
    later = [prompt(OTHER, 20, 200), prompt(b"third", 300, 201)]
    for each in later:
        planned.add(each)
    step(planned)
    assert all(each in planned.waiting for each in (large, *later))


def test_short_prompts_do_not_keep_a_long_one_waiting_for_ever() -> None:
    planned, large = filled()
    assert planned._passed is large
    planned._passed_until -= PASSED_S
    planned.add(prompt(OTHER, 20))
    step(planned)
    assert not large.block_table
    for _ in range(3000):
        if large.block_table:
            break
        assert not any(chunk[0] == OTHER for chunk in step(planned))
    assert large.block_table


def test_callers_with_as_many_sequences_do_not_preempt_each_other() -> None:
    planned = scheduler(200, batch=4, queue=80, prefill=64, prefix_reuse=False)
    for index in range(8):
        planned.add(prompt((FLOOD, OTHER)[index % 2], 40, index))
    while planned.running or planned.waiting:
        step(planned)
    assert not planned.preemptions


def test_long_prompts_share_prefill_equally() -> None:
    planned = scheduler(2000, batch=8, queue=80, prefill=64, prefix_reuse=False)
    for index in range(20):
        planned.add(prompt((FLOOD, FLOOD, FLOOD, OTHER)[index % 4], 640, index, max_new_tokens=1))
    tokens = {FLOOD: 0, OTHER: 0}
    for _ in range(60):
        for caller, count in step(planned):
            tokens[caller] += count
    assert abs(tokens[FLOOD] - tokens[OTHER]) <= 128


def test_a_stream_of_short_prompts_does_not_starve_long_ones() -> None:
    planned = scheduler(400, batch=4, queue=80, prefill=64, prefix_reuse=False)
    long = [prompt(FLOOD, 900, index) for index in range(3)]
    for each in long:
        planned.add(each)
    asked = 0
    for _ in range(400):
        if not any(other.request.caller == OTHER for other in (*planned.running, *planned.waiting)):
            planned.add(prompt(OTHER, 60, 100 + asked))
            asked += 1
        step(planned)
        if not any(each in planned.running or each in planned.waiting for each in long):
            break
    assert all(each.num_generated == 8 for each in long)
    assert asked > 5


def test_a_caller_whose_experts_are_away_takes_no_place_from_others() -> None:
    outage = Outage()
    planned = flooded(outage=outage)
    outage.organs.add("liver")
    planned.add(sequence(20, 8, "liver", caller=OTHER))
    step(planned)
    assert not planned.preemptions


def test_steps_are_short_while_another_caller_may_come_back() -> None:
    planned = scheduler(2000, batch=4, queue=80, prefill=64, prefix_reuse=False)
    for index in range(2):
        planned.add(prompt(FLOOD, 640, index))
    assert step(planned) == [(FLOOD, 64)]
    planned.add(prompt(OTHER, 20, max_new_tokens=1))
    assert step(planned) == [(OTHER, 20)]
    assert step(planned) == [(FLOOD, 16)]
    planned._shared_until -= SHARED_S
    assert step(planned) == [(FLOOD, 64)]


def test_many_prompts_do_not_slow_down_the_answers_of_another_caller() -> None:
    planned = scheduler(2000, batch=8, queue=80, prefill=512, prefix_reuse=False)
    answers = [prompt(OTHER, 20, index, max_new_tokens=400) for index in range(4)]
    for each in answers:
        planned.add(each)
    step(planned)
    tokens = {FLOOD: 0, OTHER: 0}
    for index in range(200):
        planned.add(prompt(FLOOD, 500, 10 + index, max_new_tokens=1))
        for caller, count in step(planned):
            tokens[caller] += count
        if len(planned.waiting) > 60:
            planned.finish(planned.waiting[-1])
    assert tokens[OTHER] >= 4 * 190
    # A step takes as long as its tokens. As many as one step may hold come at the beginning.
    assert tokens[FLOOD] <= 512 + 200 * AHEAD_PREFILL_TOKENS
    # Nothing is held back from a caller that was served less.
    planned._callers._served[OTHER] += 10_000
    assert sum(count for caller, count in step(planned) if caller == FLOOD) > 400


ASKED = st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.integers(1, 400), st.integers(1, 40), st.integers(0, 9))


@settings(deadline=None, max_examples=40)
@given(st.lists(ASKED, min_size=1, max_size=20))
def test_every_sequence_ends_whatever_callers_ask(asked: list[tuple[bytes, int, int, int]]) -> None:
    planned = scheduler(40, batch=4, queue=80, prefill=64, prefix_reuse=False)
    left = [
        (prompt(caller, count, index, max_new_tokens=new), at) for index, (caller, count, new, at) in enumerate(asked)
    ]
    for number in range(4000):
        for own, _ in [each for each in left if each[1] <= number]:
            planned.add(own)
        left = [each for each in left if each[1] > number]
        if not left and not planned.running and not planned.waiting:
            return
        assert step(planned) or (not planned.running and not planned.waiting), "nothing is computed"
    raise AssertionError("a sequence does not end")


def test_one_caller_alone_is_served_in_order_of_arrival() -> None:
    planned = scheduler(200, batch=2, queue=80, prefill=64, prefix_reuse=False)
    own = [prompt(FLOOD, 30, index, max_new_tokens=2) for index in range(6)]
    for each in own:
        planned.add(each)
    begun: list[Sequence] = []
    while planned.running or planned.waiting:
        chunks = planned.schedule()
        begun += [chunk.sequence for chunk in chunks if chunk.sequence not in begun]
        advance(planned, chunks)
    assert begun == own
    assert not planned.preemptions


def test_nothing_is_saved_up_while_a_caller_is_away() -> None:
    counters = ServiceCounters()
    counters.join(FLOOD)
    counters.charge(FLOOD, 1000)
    counters.join(OTHER)
    assert counters.priority(OTHER)[0] == counters.priority(FLOOD)[0] == 1000
    counters.charge(OTHER, 1)
    assert counters.priority(OTHER)[0] == 1000 + DECODED_TOKEN
    # Nor lost by leaving and coming back.
    counters.charge(OTHER, 500)
    counters.leave(OTHER)
    counters.join(OTHER)
    assert counters.priority(OTHER)[0] == 1500 + DECODED_TOKEN


def test_the_lead_of_a_caller_that_got_nothing_is_bounded() -> None:
    counters = ServiceCounters()
    counters.join(OTHER)
    counters.join(FLOOD)
    counters.charge(FLOOD, 1_000_000)
    assert counters.priority(FLOOD)[0] - counters.priority(OTHER)[0] == MAX_CREDIT
    counters.join(b"new")
    assert counters.priority(FLOOD)[0] - counters.priority(b"new")[0] == MAX_CREDIT


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.booleans()), max_size=60))
def test_counters_end_with_their_callers(script: list[tuple[bytes, bool]]) -> None:
    counters = ServiceCounters()
    active: list[bytes] = []
    for caller, joins in script:
        if joins:
            counters.join(caller)
            active.append(caller)
        elif caller in active:
            counters.charge(caller, 5)
            counters.leave(caller)
            active.remove(caller)
        assert counters.num_active == len(set(active))
    for caller in active:
        counters.leave(caller)
    assert not counters.num_active
    assert not counters._served


def test_background_sequences_make_room_first() -> None:
    planned = scheduler(200, batch=4, queue=80, prefill=64, prefix_reuse=False)
    background = [sequence(40, 40, first_token=1000 * index, background=True) for index in range(4)]
    for each in background:
        planned.add(each)
    for _ in range(8):
        step(planned)
    assert all(each.num_generated for each in background)
    planned.add(prompt(OTHER, 20))
    assert step(planned)[0] == (OTHER, 20)
    assert planned.waiting[-1] is background[-1]
    assert planned.preemptions == 1
