import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.bundles.finite import is_finite

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@given(
    dtype=st.sampled_from(DTYPES),
    size=st.integers(1, 400),
    value=st.sampled_from((math.nan, math.inf, -math.inf)),
    data=st.data(),
)
def test_one_value_anywhere_is_found(dtype: torch.dtype, size: int, value: float, data: st.DataObject) -> None:
    tensor = torch.linspace(-1.0, 1.0, size).to(dtype)
    assert is_finite(tensor)
    tensor[data.draw(st.integers(0, size - 1))] = value
    assert not is_finite(tensor)


@given(dtype=st.sampled_from(DTYPES), values=st.lists(st.floats(width=16), max_size=40))
def test_it_is_what_torch_says_of_every_value(dtype: torch.dtype, values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    assert is_finite(tensor) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    assert is_finite(torch.tensor([limits.min, 0.0, limits.max], dtype=dtype))


def test_whole_numbers_and_nothing_at_all_are_finite() -> None:
    assert is_finite(torch.tensor([2**62, -1]))
    assert is_finite(torch.empty(0, 3))
