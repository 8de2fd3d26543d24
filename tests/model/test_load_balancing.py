from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from echovlm_ray.model.load_balancing import load_balancing_loss
from tests.model.support import small_model


@given(st.integers(2, 7), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_it_is_transformers_loss(experts: int, layers: int, top_k: int, padded: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    top_k = min(top_k, experts)
    logits: Any = tuple(torch.randn(10, experts, generator=generator) for _ in range(layers))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]) if padded else None
    expected = load_balancing_loss_func(logits, experts, top_k, mask)
    torch.testing.assert_close(load_balancing_loss(logits, top_k, mask), expected)


def test_padding_does_not_count() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([logits, torch.tensor([[100.0, 0, 0, 0]] * 2)])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert torch.equal(load_balancing_loss([padded], 2, mask), load_balancing_loss([logits], 2))
    assert load_balancing_loss([padded], 2) > load_balancing_loss([logits], 2)


def test_even_routing_is_the_least() -> None:
    even = torch.eye(4).repeat(4, 1) * 10
    torch.testing.assert_close(load_balancing_loss([even], 1), torch.tensor(1.0))
    skewed = torch.tensor([[10.0, 0, 0, 0]]).repeat(16, 1)
    assert load_balancing_loss([skewed], 1) > 3.9


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no router logits"):
        load_balancing_loss([], 2)
    with pytest.raises(ValueError, match="covers 3 tokens and the router logits 4"):
        load_balancing_loss([torch.zeros(4, 4)], 2, torch.ones(1, 3))


@pytest.mark.parametrize("num_experts", [4, 6])
def test_it_joins_the_loss_with_the_configured_factor(num_experts: int) -> None:
    model = small_model(num_experts=num_experts, router_aux_loss_coef=0.25, output_router_logits=True).train()
    ids = torch.randint(1, 900, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    labels = ids.masked_fill(mask == 0, -100)
    with_loss = model(input_ids=ids, attention_mask=mask, labels=labels)
    without = model(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=False)
    assert without.router_logits is None
    assert without.aux_loss is None
    assert [logits.shape for logits in with_loss.router_logits] == [(18, num_experts)] * 2
    expected = load_balancing_loss_func(with_loss.router_logits, num_experts, 2, mask)
    torch.testing.assert_close(with_loss.aux_loss, expected)
    torch.testing.assert_close(with_loss.loss, without.loss + 0.25 * expected)
    assert model(input_ids=ids, attention_mask=mask).aux_loss is not None
