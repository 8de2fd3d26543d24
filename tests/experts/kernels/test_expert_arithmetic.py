"""What surrounds the products of experts, against torch's operators."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.kernels.compiled import as_array
from experts.kernels.expert_arithmetic import add_pairs, gather_pairs, swiglu

TOKENS = 5
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    projected_TF = 4 * torch.randn(TOKENS, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    projected_TF[0, :6] = torch.tensor([0.0, -0.0, 100.0, -100.0, 3e38, -3e38])
    inner_TF = torch.empty(TOKENS, 37, dtype=dtype)
    swiglu(as_array(projected_TF), 0, 50, as_array(inner_TF))
    expected_TF = F.silu(projected_TF[:, :37]) * projected_TF[:, 50:87]
    torch.testing.assert_close(inner_TF[:, 6:], expected_TF[:, 6:])
    # Where silu vanishes, what is left of it differs, and is next to nothing.
    torch.testing.assert_close(inner_TF[:, :5], expected_TF[:, :5], atol=1e-33, rtol=1.6e-2)
    assert abs(float(inner_TF[0, 5])) < 200


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_passes_on_what_is_not_a_number(dtype: torch.dtype) -> None:
    projected_TF = torch.ones(3, 8, dtype=dtype)
    projected_TF[0, 2] = projected_TF[2, 7] = torch.nan
    inner_TF = torch.empty(3, 4, dtype=dtype)
    swiglu(as_array(projected_TF), 0, 4, as_array(inner_TF))
    assert inner_TF.isnan().nonzero().tolist() == [[0, 2], [2, 3]]


@given(tokens=st.integers(0, 20), top_k=st.integers(1, 4), num_experts=st.integers(1, 6), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_pairs_go_to_their_experts_and_come_back(tokens: int, top_k: int, num_experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    index_TK = torch.randint(-1, num_experts, (tokens, top_k), generator=generator)
    x_TD = torch.randn(tokens, 3, generator=generator)
    weight_TK = torch.rand(tokens, top_k, generator=generator)
    starts_E = np.empty(num_experts + 1, dtype=np.int64)
    pair_P = np.empty(tokens * top_k, dtype=np.int64)
    x_PD = torch.zeros(tokens * top_k, 3)
    gather_pairs(index_TK.numpy(), as_array(x_TD), starts_E, pair_P, as_array(x_PD))
    expected = [(index_TK.flatten() == expert).nonzero().flatten().tolist() for expert in range(num_experts)]
    found = [pair_P[starts_E[expert] : starts_E[expert + 1]].tolist() for expert in range(num_experts)]
    assert found == expected
    count = int(starts_E[-1])
    assert torch.equal(x_PD[:count], x_TD[torch.from_numpy(pair_P[:count]) // top_k])
    # As if every expert multiplied by its number, counted from 1.
    factor_P = torch.from_numpy(np.repeat(np.arange(1, num_experts + 1), np.diff(starts_E)))
    output_PD = F.pad(x_PD[:count] * factor_P[:, None], (0, 0, 0, len(x_PD) - count))
    sum_TD = torch.full_like(x_TD, torch.nan)
    add_pairs(as_array(output_PD), pair_P, count, as_array(weight_TK), as_array(sum_TD))
    torch.testing.assert_close(sum_TD, x_TD * (weight_TK * (index_TK + 1)).sum(1, keepdim=True))
