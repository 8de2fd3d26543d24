"""The whole conformance suite on a GPU. Skipped where there is none; `make gpu-check` runs it where there is one."""

from typing import Any

import pytest
import torch

from experts.kernels.base import ExpertWeights
from experts.kernels.registry import KernelUnavailableError, get_kernel
from tests.experts.kernels.conformance import (
    CASES,
    Case,
    check_case,
    check_gradients,
    check_no_expert_is_exactly_zero,
    distinct,
    make_exchange,
    make_weights,
    on_device,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device; see make gpu-check")

NAMES = ("reference", "torch_grouped", "triton_small", "megablocks_sparse", "megablocks_grouped", "auto")
FAST = ("triton_small", "megablocks_sparse", "megablocks_grouped")
# The released sizes, where an expert group in bfloat16 has a twelfth of a gigabyte.
RELEASED = tuple(
    Case(f"{experts} experts of {inner}, {tokens} tokens", experts, 3584, inner, tokens, top_k, distinct)
    for experts, inner, top_k in ((4, 1408, 2), (8, 1408, 2), (2, 18944, 1))
    for tokens in (1, 16, 17, 32, 33, 300)
)


def kernel_named(name: str) -> Any:
    try:
        return get_kernel(name)
    except KernelUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", [*CASES, *RELEASED], ids=lambda case: case.name)
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name: str, case: Case) -> None:
    check_case(kernel_named(name), case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_triton_small_in_float32(case: Case) -> None:
    """The one kernel for a GPU that does not round float32 to TF32."""
    check_case(kernel_named("triton_small"), case, torch.float32, "cuda")


@pytest.mark.parametrize("name", NAMES)
def test_no_expert_is_exactly_zero(name: str) -> None:
    check_no_expert_is_exactly_zero(kernel_named(name), torch.bfloat16, "cuda")


def test_gradients() -> None:
    check_gradients(get_kernel("torch_grouped"), torch.bfloat16, "cuda")


def test_megablocks_refuses_what_it_would_round() -> None:
    weights = on_device(make_weights(2, 64, 48, torch.float32), "cuda", torch.float32)
    with pytest.raises(ValueError, match=r"takes bfloat16, float16, not torch\.float32"):
        kernel_named("megablocks_sparse").load(weights)


def large_exchange(tokens: int) -> tuple[ExpertWeights, tuple[torch.Tensor, ...]]:
    case = Case("large", 4, 3584, 1408, tokens, 2, distinct)
    weights = make_weights(case.experts, case.hidden, case.inner, torch.bfloat16)
    exchange = tuple(tensor.cuda() for tensor in make_exchange(case, torch.bfloat16))
    return on_device(weights, "cuda", torch.bfloat16), exchange


@pytest.mark.parametrize("tokens", [8, 32, 700])
@pytest.mark.parametrize("name", FAST)
def test_equal_calls_give_equal_bits_and_places_do_not_matter(name: str, tokens: int) -> None:
    weights, (x_TD, index_TK, weight_TK) = large_exchange(tokens)
    prepared = kernel_named(name).load(weights)
    with torch.inference_mode():
        output_TD = prepared.forward(x_TD, index_TK, weight_TK)
        for _ in range(10):
            assert torch.equal(prepared.forward(x_TD, index_TK, weight_TK), output_TD)
        assert torch.equal(prepared.forward(x_TD, index_TK.flip(1), weight_TK.flip(1)), output_TD)


@pytest.mark.parametrize("tokens", [1, 8, 32])
def test_triton_small_in_a_cuda_graph(tokens: int) -> None:
    """A captured call gives, for new inputs, the bits of a plain one: the routing was not read on the host."""
    weights, (x_TD, index_TK, weight_TK) = large_exchange(tokens)
    prepared = kernel_named("triton_small").load(weights)
    with torch.inference_mode():
        prepared.forward(x_TD, index_TK, weight_TK)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured_TD = prepared.forward(x_TD, index_TK, weight_TK)
        for shift in range(4):
            x_TD.copy_(torch.roll(x_TD, 1, dims=1))
            index_TK.copy_((index_TK + shift) % 4)
            graph.replay()
            assert torch.equal(captured_TD, prepared.forward(x_TD, index_TK, weight_TK))


def test_weights_of_megablocks_are_read_where_they_lie() -> None:
    weights, exchange = large_exchange(32)
    sparse = kernel_named("megablocks_sparse").load(weights)
    held = torch.cuda.memory_allocated()
    shared = kernel_named("triton_small").load(sparse.weights)
    assert torch.cuda.memory_allocated() - held < weights.nbytes // 10
    own = kernel_named("triton_small").load(weights)
    with torch.inference_mode():
        torch.testing.assert_close(shared.forward(*exchange), own.forward(*exchange), rtol=2e-2, atol=2e-2)
