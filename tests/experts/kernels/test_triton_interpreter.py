"""The kernels for a GPU, run by Triton's interpreter on the CPU: the whole conformance suite, in float32.

The interpreter computes nothing sensible in bfloat16; that is for `tests/gpu`.
"""

import sys
from types import ModuleType

import pytest
import torch

from experts.kernels import megablocks_sparse
from experts.kernels.base import ExpertKernel, ExpertWeights
from experts.kernels.grouping import OrderedPairs
from experts.kernels.reference import ReferenceKernel
from experts.kernels.registry import get_kernel
from tests.experts.kernels.conformance import (
    CASES,
    Case,
    check_case,
    check_no_expert_is_exactly_zero,
    make_exchange,
    make_weights,
    on_device,
    relative_error,
)
from tests.experts.kernels.triton_only import NEEDS_INTERPRETER, take_one_configuration

pytestmark = NEEDS_INTERPRETER

NAMES = ("megablocks_sparse", "triton_small")
# Tens of thousands of rows are tens of thousands of interpreted programs; the overflow can be seen with few rows.
INTERPRETABLE = [case for case in CASES if not case.large or "experts × inner" in case.name]


@pytest.fixture(autouse=True, scope="module")
def one_configuration() -> None:
    take_one_configuration()


@pytest.mark.parametrize("case", INTERPRETABLE, ids=lambda case: case.name)
@pytest.mark.parametrize("name", NAMES)
def test_case(name: str, case: Case) -> None:
    check_case(get_kernel(name), case, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_no_expert_is_exactly_zero(name: str) -> None:
    check_no_expert_is_exactly_zero(get_kernel(name), torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_float16(name: str) -> None:
    case = Case("float16", hidden=160, inner=200, tokens=40)
    weights = make_weights(case.experts, case.hidden, case.inner, torch.float16)
    x_TD, index_TK, weight_TK = make_exchange(case, torch.float16)
    oracle = ReferenceKernel().load(on_device(weights, "cpu", torch.float32))
    expected_TD = oracle.forward(x_TD.float(), index_TK, weight_TK.float())
    assert relative_error(get_kernel(name).load(weights).forward(x_TD, index_TK, weight_TK), expected_TD) <= 2e-3


@pytest.mark.parametrize("name", NAMES)
def test_equal_calls_give_equal_bits_and_places_do_not_matter(name: str) -> None:
    weights = make_weights(4, 64, 48, torch.float16)
    x_TD, _, weight_TK = make_exchange(Case("", tokens=20, top_k=3), torch.float16)
    index_TK = torch.stack([torch.randperm(4)[:3] for _ in range(20)]).int()
    prepared = get_kernel(name).load(weights)
    output_TD = prepared.forward(x_TD, index_TK, weight_TK)
    assert torch.equal(prepared.forward(x_TD, index_TK, weight_TK), output_TD)
    assert torch.equal(prepared.forward(x_TD, index_TK.flip(1), weight_TK.flip(1)), output_TD)


@pytest.mark.parametrize("name", NAMES)
def test_sums_are_taken_in_float32(name: str) -> None:
    """64 parts of a 64th are the whole."""
    weights = make_weights(1, 64, 64, torch.float16)
    x_TD, _, _ = make_exchange(Case("", tokens=4), torch.float16)
    prepared = get_kernel(name).load(weights)
    whole_TD = prepared.forward(x_TD, torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, 1).half())
    share_TK = torch.full((4, 64), 1 / 64).half()
    parts_TD = prepared.forward(x_TD, torch.zeros(4, 64, dtype=torch.int32), share_TK)
    assert relative_error(parts_TD, whole_TD) <= 2e-4


def test_many_rows_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("parts", tokens=90)
    weights = make_weights(case.experts, case.hidden, case.inner, torch.float32)
    exchange = make_exchange(case, torch.float32)
    whole_TD = get_kernel("megablocks_sparse").load(weights).forward(*exchange)
    monkeypatch.setattr(megablocks_sparse, "_MAX_ELEMENTS", 128 * 128 * 6)
    prepared = get_kernel("megablocks_sparse").load(weights)
    calls: list[int] = []
    exchanged = prepared._exchange  # type: ignore[attr-defined]

    def counted(x_TD: torch.Tensor, pairs: OrderedPairs) -> torch.Tensor:
        calls.append(len(x_TD))
        return torch.as_tensor(exchanged(x_TD, pairs))

    monkeypatch.setattr(prepared, "_exchange", counted)
    assert relative_error(prepared.forward(*exchange), whole_TD) <= 1e-6
    assert calls == [64, 26]


def test_too_many_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megablocks_sparse, "_MAX_ELEMENTS", 4 * 128 * 128)
    with pytest.raises(ValueError, match=r"4 experts of 128 × 128 are too many .* choose torch_grouped"):
        get_kernel("megablocks_sparse").load(make_weights(4, 64, 48, torch.float32))


@pytest.mark.parametrize("hidden", [128, 72])
def test_triton_small_reads_the_weights_of_megablocks_where_they_lie(hidden: int) -> None:
    case = Case("shared", hidden=hidden, inner=hidden)
    weights = make_weights(case.experts, hidden, hidden, torch.float32)
    sparse = get_kernel("megablocks_sparse").load(weights)
    shared: ExpertWeights = sparse.weights  # type: ignore[attr-defined]
    for found, expected in zip(
        (shared.gate_EFD, shared.up_EFD, shared.down_EDF),
        (weights.gate_EFD, weights.up_EFD, weights.down_EDF),
        strict=True,
    ):
        assert torch.equal(found, expected)
    small = get_kernel("triton_small").load(shared)
    assert small._gate_EFD.data_ptr() == sparse._gate_HD.data_ptr()  # type: ignore[attr-defined]
    exchange = make_exchange(case, torch.float32)
    assert relative_error(small.forward(*exchange), ReferenceKernel().load(weights).forward(*exchange)) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_other_types_are_refused(name: str) -> None:
    weights = make_weights(2, 64, 48, torch.float32)
    x_TD, index_TK, weight_TK = make_exchange(Case("", experts=2), torch.float32)
    with pytest.raises(ValueError, match=rf"{name} has no gradients; train with torch_grouped"):
        get_kernel(name).load(weights).forward(x_TD.requires_grad_(), index_TK, weight_TK)
    with pytest.raises(ValueError, match=r"not torch\.float64; convert the weights"):
        get_kernel(name).load(on_device(weights, "cpu", torch.float64))


@pytest.fixture
def grouped_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one function of grouped_gemm that we call, in torch: the package itself only works on a GPU."""

    def gmm(a_RI: torch.Tensor, b_EOI: torch.Tensor, sizes_E: torch.Tensor, trans_b: bool) -> torch.Tensor:
        assert trans_b
        assert (sizes_E.dtype, sizes_E.device.type, int(sizes_E.sum())) == (torch.int64, "cpu", len(a_RI))
        parts = zip(a_RI.split(sizes_E.tolist()), b_EOI, strict=True)
        return torch.cat([a @ b.T for a, b in parts])

    package = ModuleType("grouped_gemm")
    package.ops = ModuleType("grouped_gemm.ops")  # type: ignore[attr-defined]
    package.ops.gmm = gmm
    monkeypatch.setitem(sys.modules, "grouped_gemm", package)


@pytest.mark.parametrize("case", [case for case in CASES if not case.large], ids=lambda case: case.name)
def test_grouped(case: Case, grouped_gemm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from experts.kernels import megablocks_grouped

    kernel: ExpertKernel = megablocks_grouped.MegaBlocksGroupedKernel()
    weights = make_weights(case.experts, case.hidden, case.inner, torch.bfloat16)
    with pytest.raises(ValueError, match=r"takes bfloat16, not torch\.float32"):
        kernel.load(on_device(weights, "cpu", torch.float32))
    # What surrounds the products is the same in every type, and the interpreter needs float32.
    monkeypatch.setattr(megablocks_grouped, "check_weights", lambda *_: None)
    check_case(kernel, case, torch.float32)
