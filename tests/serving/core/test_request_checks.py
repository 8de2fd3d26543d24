import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.serving.core.request_checks import check_sampling
from protos import router_pb2

# Smallest denormal and normal numbers, and what is next to the ends of the ranges.
REFUSED = [1e-45, 1e-40, 1.2e-38, 1e-5, 0.00999, 100.01, 1e30, 3.4e38, math.inf, math.nan, -1e-45, -1.0]


def sampling_of(field: str, value: float) -> router_pb2.Sampling:
    sampling = router_pb2.Sampling()
    setattr(sampling, field, value)
    return sampling


@pytest.mark.parametrize("field", ["temperature", "repetition_penalty"])
@pytest.mark.parametrize("value", REFUSED)
def test_numbers_that_could_overflow_are_refused_with_their_range(field: str, value: float) -> None:
    with pytest.raises(InvalidRequestError, match=f"sampling.{field}: must be 0 .*from 0.01 to 100"):
        check_sampling(sampling_of(field, value))


@pytest.mark.parametrize("value", [1e-45, 9e-5, 1.001, math.inf, math.nan, -0.5])
def test_so_is_a_top_p(value: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"sampling.top_p: must be 0 or from 0.0001 to 1"):
        check_sampling(router_pb2.Sampling(top_p=value))


@given(
    temperature=st.just(0.0) | st.floats(0.01, 100),
    top_p=st.just(0.0) | st.floats(0.0001, 1),
    penalty=st.just(0.0) | st.floats(0.01, 100),
)
def test_the_ranges_hold_their_ends(temperature: float, top_p: float, penalty: float) -> None:
    check_sampling(router_pb2.Sampling(temperature=temperature, top_p=top_p, repetition_penalty=penalty))
