"""What the kernels that run on a CPU must do beyond the conformance suite, against sums taken in float64 by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.kernels.base import NO_EXPERT, ExpertKernel, ExpertWeights
from experts.kernels.registry import get_kernel
from tests.experts.kernels.conformance import TOLERANCE, make_weights, relative_error

CPU_KERNELS = ("reference", "cpu_packed", "torch_grouped", "auto")

pytestmark = pytest.mark.parametrize("kernel", [get_kernel(name) for name in CPU_KERNELS], ids=CPU_KERNELS)


def make_exchange(
    tokens: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype, seed: int = 1, lowest: int = NO_EXPERT
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn((tokens, hidden), generator=generator).to(dtype)
    index_TK = torch.randint(lowest, experts, (tokens, top_k), generator=generator, dtype=torch.int32)
    weight_TK = torch.rand((tokens, top_k), generator=generator).to(dtype)
    return x_TD, index_TK, weight_TK


def by_hand(
    weights: ExpertWeights, x_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    gate, up, down = weights.gate_EFD.double(), weights.up_EFD.double(), weights.down_EDF.double()
    result = torch.zeros(x_TD.shape, dtype=torch.float64)
    for token, (indices, factors) in enumerate(zip(index_TK.tolist(), weight_TK.double().tolist(), strict=True)):
        x = x_TD[token].double()
        for expert, factor in zip(indices, factors, strict=True):
            if expert != NO_EXPERT:
                inner = gate[expert] @ x
                result[token] += factor * (down[expert] @ (inner / (1 + torch.exp(-inner)) * (up[expert] @ x)))
    return result


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("experts", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_agrees_with_float64(kernel: ExpertKernel, dtype: torch.dtype, experts: int, tokens: int) -> None:
    weights = make_weights(experts, 48, 40, dtype)
    x_TD, index_TK, weight_TK = make_exchange(tokens, 48, experts, 2, dtype)
    index_TK[0, 0] = 0
    prepared = kernel.load(weights)
    output_TD = prepared.forward(x_TD, index_TK, weight_TK)
    assert (output_TD.dtype, output_TD.shape) == (dtype, x_TD.shape)
    assert relative_error(output_TD, by_hand(weights, x_TD, index_TK, weight_TK)) <= TOLERANCE[dtype]
    assert prepared.nbytes >= weights.nbytes


@given(
    tokens=st.integers(0, 9),
    experts=st.integers(1, 5),
    top_k=st.integers(0, 4),
    hidden=st.integers(1, 33),
    inner=st.integers(1, 33),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_agrees_at_any_size(
    kernel: ExpertKernel, tokens: int, experts: int, top_k: int, hidden: int, inner: int, seed: int
) -> None:
    """Odd sizes, no rows, no pairs, an expert twice in one row, experts without rows."""
    weights = make_weights(experts, hidden, inner, torch.float32, seed)
    exchange = make_exchange(tokens, hidden, experts, top_k, torch.float32, seed)
    output_TD = kernel.load(weights).forward(*exchange)
    torch.testing.assert_close(output_TD.double(), by_hand(weights, *exchange), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equal_calls_give_equal_bits(kernel: ExpertKernel, dtype: torch.dtype) -> None:
    weights = make_weights(4, 64, 48, dtype)
    exchange = make_exchange(33, 64, 4, 2, dtype)
    first = kernel.load(weights).forward(*exchange)
    prepared = kernel.load(weights)
    for _ in range(5):
        assert torch.equal(prepared.forward(*exchange), first)


def test_experts_are_added_in_their_own_order(kernel: ExpertKernel) -> None:
    """In which of its k places a token names an expert makes no difference, not even by a bit."""
    weights = make_weights(4, 32, 32, torch.bfloat16)
    x_TD, index_TK, weight_TK = make_exchange(20, 32, 4, 3, torch.bfloat16)
    prepared = kernel.load(weights)
    index_TK = torch.stack([torch.randperm(4)[:3] for _ in range(20)]).int()
    flipped = prepared.forward(x_TD, index_TK.flip(1), weight_TK.flip(1))
    assert torch.equal(prepared.forward(x_TD, index_TK, weight_TK), flipped)


def test_sums_are_taken_in_float32(kernel: ExpertKernel) -> None:
    """64 parts of a 64th are the whole; sums in bfloat16 would lose several per cent on the way."""
    weights = make_weights(1, 64, 64, torch.bfloat16)
    x_TD, _, _ = make_exchange(16, 64, 1, 1, torch.bfloat16)
    prepared = kernel.load(weights)
    whole = prepared.forward(x_TD, torch.zeros(16, 1, dtype=torch.int32), torch.ones(16, 1).bfloat16())
    share = torch.full((16, 64), 1 / 64).bfloat16()
    parts = prepared.forward(x_TD, torch.zeros(16, 64, dtype=torch.int32), share)
    assert relative_error(parts, whole.double()) <= 2e-3
    lossy = torch.zeros_like(whole)
    for _ in range(64):
        lossy += whole / 64
    assert relative_error(lossy, whole.double()) > 1e-2, "the bound tells the two apart"


def test_inputs_are_left_alone(kernel: ExpertKernel) -> None:
    weights = make_weights(2, 16, 16, torch.float32)
    exchange = make_exchange(5, 16, 2, 2, torch.float32)
    before = [tensor.clone() for tensor in exchange]
    kernel.load(weights).forward(*exchange)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(exchange, before, strict=True))
