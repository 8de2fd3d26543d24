import math
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from echovlm_ray.engine import sampler
from echovlm_ray.engine.sampler import NonFiniteLogitsError, next_tokens
from echovlm_ray.engine.sequence import SamplingParams, Sequence, SequenceRequest

VOCABULARY = 50


def sequence(sampling: SamplingParams, token_ids: list[int]) -> Sequence:
    request = SequenceRequest(
        input_ids=tuple(token_ids),
        position_ids_3T=torch.zeros(3, len(token_ids), dtype=torch.int64),
        position_delta=0,
        expert_set_id="set",
        shares=(("breast", 1.0),),
        max_new_tokens=4,
        sampling=sampling,
    )
    return Sequence.start(request, lambda output: None, ())


def next_token(own: Sequence, logits_V: torch.Tensor) -> int:
    (chosen,) = next_tokens([(own, logits_V)])
    if isinstance(chosen, Exception):
        raise chosen
    return chosen


@settings(max_examples=150, deadline=None)
@example(seed=0, temperature=0.5, top_k=0, top_p=1 - 1e-16, penalty=1.0, token_ids=[0])
@given(
    seed=st.integers(0, 2**32),
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, VOCABULARY + 5),
    top_p=st.floats(0.05, 1.0),
    penalty=st.floats(0.5, 2.0),
    token_ids=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20),
)
def test_the_distribution_is_that_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, penalty: float, token_ids: list[int]
) -> None:
    logits_V = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
        + ([TopKLogitsWarper(top_k)] if top_k else [])
        + ([TopPLogitsWarper(top_p)] if top_p < 1 else [])
    )
    seen = cast(torch.LongTensor, torch.tensor([token_ids]))
    expected = processors(seen, cast(torch.FloatTensor, logits_V[None].clone()))[0].softmax(-1)
    sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty, seed=1)
    found = sampler.distribution(sampling, token_ids, logits_V)
    # A token whose cumulative probability falls on top_p to the last bit may be kept by one and not the other.
    assert ((found > 0) != (expected > 0)).sum() <= 1
    if bool(((found > 0) == (expected > 0)).all()):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_top_p_next_to_one_keeps_the_unlikely() -> None:
    """The tail is far below what float32 tells from 1, and far above what top_p leaves out."""
    logits_V = torch.cat([torch.zeros(2), torch.full((40,), -18.0)])
    found = sampler.distribution(SamplingParams(temperature=1.0, top_p=1 - 1e-12, seed=1), [0], logits_V)
    assert (found > 0).all()


def test_draws_follow_the_distribution() -> None:
    logits_V = torch.tensor([0.0, math.log(3.0), -torch.inf])
    own = sequence(SamplingParams(temperature=1.0, seed=3), [0])
    drawn = [next_token(own, logits_V) for _ in range(4000)]
    assert set(drawn) == {0, 1}
    assert drawn.count(1) / len(drawn) == pytest.approx(0.75, abs=0.03)


def test_a_seed_repeats_itself_and_another_does_not() -> None:
    logits_V = torch.randn(VOCABULARY)
    draws = []
    for seed in (7, 7, 8, None):
        own = sequence(SamplingParams(temperature=1.5, seed=seed), [0])
        draws.append([next_token(own, logits_V) for _ in range(30)])
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert draws[0] != draws[3]


def test_every_seed_of_64_bits_has_draws_of_its_own() -> None:
    logits_V = torch.zeros(VOCABULARY)
    edges = {power for bits in range(65) for power in (2**bits - 1, 2**bits, 2**bits + 1) if power < 2**64}
    drawn = {}
    for seed in sorted(edges):
        own, again = (sequence(SamplingParams(temperature=1.0, seed=seed), [0]) for _ in range(2))
        drawn[seed] = tuple(next_token(own, logits_V) for _ in range(16))
        assert drawn[seed] == tuple(next_token(again, logits_V) for _ in range(16))
    assert drawn[0] != drawn[2**63]
    assert len(set(drawn.values())) == len(edges)


def test_a_token_without_probability_is_never_drawn() -> None:
    logits_V = torch.full((VOCABULARY,), -torch.inf)
    logits_V[[0, 20, VOCABULARY - 1]] = 0.0
    own = sequence(SamplingParams(temperature=1.0, seed=5), [0])
    for number in (0.0, 1 / 3, 0.5, 1 - 2**-53):
        own.generator = cast(np.random.Generator, _Drawn(number))
        assert next_token(own, logits_V) in (0, 20, VOCABULARY - 1)


class _Drawn:
    """A generator that always draws one number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


def test_greedy_takes_the_largest_and_honours_the_penalty() -> None:
    logits_V = torch.tensor([1.0, 2.0, 1.9, -1.0])
    assert next_token(sequence(SamplingParams(), [1]), logits_V) == 1
    assert next_token(sequence(SamplingParams(repetition_penalty=1.2), [1]), logits_V) == 2
    assert logits_V.tolist() == pytest.approx([1.0, 2.0, 1.9, -1.0]), "the caller's logits were changed"


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    assert next_token(sequence(SamplingParams(temperature=1e-30, seed=0), [0]), torch.tensor([5.0, 900.0, 3.0])) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(temperature: float, value: float) -> None:
    with pytest.raises(NonFiniteLogitsError):
        next_token(sequence(SamplingParams(temperature=temperature), [0]), torch.tensor([1.0, value, 2.0]))


@given(
    logits=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4),
    temperature=st.just(0.0) | st.floats(2.0**-149, 2.0**127, width=32),
    top_k=st.integers(0, 5),
    top_p=st.floats(2.0**-149, 1, width=32),
    penalty=st.floats(2.0**-149, 2.0**127, width=32),
)
@example(logits=[9.0, -9.0, 1.0, 0.0], temperature=0.0, top_k=0, top_p=1.0, penalty=1e-40)
@example(logits=[9.0, -9.0, 1.0, 0.0], temperature=1.0, top_k=0, top_p=1.0, penalty=3e38)
def test_finite_logits_give_a_token_whatever_a_caller_asks_for(
    logits: list[float], temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    sampling = SamplingParams(temperature, top_k, top_p, penalty)
    assert 0 <= next_token(sequence(sampling, [0, 1, 1]), torch.tensor(logits)) < 4


def test_a_penalty_hides_no_bad_logit_of_the_model() -> None:
    own = sequence(SamplingParams(repetition_penalty=100.0), [1])
    with pytest.raises(NonFiniteLogitsError):
        next_token(own, torch.tensor([1.0, math.inf, 2.0]))


def test_a_step_chooses_for_each_sequence_as_if_it_were_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=1.5, seed=4),
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(temperature=0.7, top_k=5, top_p=0.8, repetition_penalty=1.2, seed=9),
    ] * 3
    together = [sequence(kind, [3, 5, 5, 11]) for kind in kinds]
    alone = [sequence(kind, [3, 5, 5, 11]) for kind in kinds]
    for _ in range(20):
        logits_BV = torch.randn(len(kinds), VOCABULARY, generator=generator)
        chosen = next_tokens(list(zip(together, logits_BV, strict=True)))
        assert chosen == [next_token(own, logits_V) for own, logits_V in zip(alone, logits_BV, strict=True)]


def test_one_row_with_nan_affects_no_other_row() -> None:
    logits_BV = torch.randn(4, VOCABULARY)
    logits_BV[1, 7] = torch.nan
    logits_BV[3, 2] = torch.inf
    own = [sequence(SamplingParams(temperature=temperature), [0]) for temperature in (0.0, 0.0, 1.0, 1.0)]
    chosen = next_tokens(list(zip(own, logits_BV, strict=True)))
    assert [isinstance(each, NonFiniteLogitsError) for each in chosen] == [False, True, False, True]
    assert chosen[0] == int(logits_BV[0].argmax())
    assert next_tokens([]) == []


@given(
    st.lists(
        st.lists(st.floats(-9, 9, width=32) | st.just(math.nan) | st.just(math.inf), min_size=8, max_size=8),
        min_size=1,
        max_size=5,
    )
)
def test_the_largest_values_are_found_alike_on_a_processor_and_on_a_device(values: list[list[float]]) -> None:
    rows = list(torch.tensor(values))
    here, there = sampler._highest(rows), sampler._highest_together(rows)
    for (one, place), (other, other_place) in zip(here, there, strict=True):
        if math.isnan(one):
            assert math.isnan(other)
        else:
            assert (one, place) == (other, other_place)
