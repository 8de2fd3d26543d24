import concurrent.futures
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.kernels import onednn_product, packed_linear
from experts.kernels.cpu import library, panel_weights
from experts.kernels.cpu.library import ENVIRONMENT, NONE, cpu_library
from experts.kernels.cpu.panel_weights import PanelWeights
from experts.kernels.onednn_product import MAX_ROWS, OneDnnWeights, padded_rows
from experts.kernels.packed_linear import PackedLinear, describe_products, packing_available, unavailable_reason

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_can_be_packed_here(dtype: torch.dtype) -> None:
    assert packing_available(dtype), unavailable_reason(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    seed=st.integers(0, 99),
)
# The layout stays the same for all examples.
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_is_the_linear_layer(
    layout: Any, dtype: torch.dtype, with_bias: bool, leading: list[int], inputs: int, outputs: int, seed: int
) -> None:
    weight_OI = random(outputs, inputs, dtype=dtype, seed=seed)
    bias_O = random(outputs, dtype=dtype, seed=seed + 1) if with_bias else None
    x = random(*leading, inputs, dtype=dtype, seed=seed + 2)
    linear = PackedLinear(weight_OI, bias_O)
    expected = F.linear(x.double(), weight_OI.double(), None if bias_O is None else bias_O.double())
    found = linear(x)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    assert float((found.double() - expected).norm()) <= DTYPES[dtype] * float(expected.norm()) + 1e-6
    assert linear.nbytes >= weight_OI.nbytes + (0 if bias_O is None else bias_O.nbytes)
    assert (linear.in_features, linear.out_features, linear.dtype) == (inputs, outputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# From 1025 inputs on, oneDNN treats a lone row differently.
@given(
    rows=st.integers(1, 512),
    inputs=st.one_of(st.integers(1, 300), st.integers(1025, 3000)),
    outputs=st.integers(1, 300),
    seed=st.integers(0, 99),
)
# The layout stays the same for all examples.
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_row_has_the_same_bits_in_any_batch(
    layout: Any, dtype: torch.dtype, rows: int, inputs: int, outputs: int, seed: int
) -> None:
    linear = PackedLinear(random(outputs, inputs, dtype=dtype, seed=seed))
    x_TI = random(rows, inputs, dtype=dtype, seed=seed + 1)
    whole = linear(x_TI)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(linear(x_TI[row : row + 1]), whole[row : row + 1])
    assert torch.equal(linear(x_TI[: (rows + 1) // 2]), whole[: (rows + 1) // 2])
    assert torch.equal(linear(x_TI.flip(0)), whole.flip(0))


def test_views_and_modes(layout: Any) -> None:
    weight_OI = random(24, 40, dtype=torch.float32)
    with torch.inference_mode():
        packed_in_inference = PackedLinear(weight_OI)
    x = random(6, 4, 80, dtype=torch.float32)
    plain = PackedLinear(weight_OI)(x[..., 40:].contiguous())
    assert torch.equal(packed_in_inference(x[..., 40:]), plain)
    assert torch.equal(packed_in_inference(x[:, ::2, 40:]), plain[:, ::2])
    with torch.inference_mode():
        assert torch.equal(PackedLinear(weight_OI)(x[..., 40:]), plain)


def test_the_plain_weights_are_not_needed_any_more(layout: Any) -> None:
    weight_OI = random(24, 40, dtype=torch.float32)
    linear = PackedLinear(weight_OI)
    x = random(3, 40, dtype=torch.float32)
    before = linear(x)
    weight_OI.zero_()
    assert torch.equal(linear(x), before)


@given(st.integers(1, MAX_ROWS))
def test_rows_are_padded_to_few_sizes(rows: int) -> None:
    padded = padded_rows(rows)
    assert rows <= padded <= MAX_ROWS
    assert padded - rows <= min(15, max(1, rows // 4))
    assert padded_rows(padded) == padded
    assert len({padded_rows(count) for count in range(1, MAX_ROWS + 1)}) < 50


def test_more_rows_than_one_piece_has(layout: Any) -> None:
    linear = PackedLinear(random(24, 40, dtype=torch.float32))
    x_TI = random(2 * MAX_ROWS + 1, 40, dtype=torch.float32)
    rows = (0, MAX_ROWS - 1, MAX_ROWS, 2 * MAX_ROWS)
    assert torch.equal(linear(x_TI)[list(rows)], torch.cat([linear(x_TI[row : row + 1]) for row in rows]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_some_rows_are_computed_in_place(layout: Any, dtype: torch.dtype) -> None:
    linear = PackedLinear(random(45, 37, dtype=dtype), random(45, dtype=dtype))
    x_TI = random(30, 37, dtype=dtype)
    output_TO = torch.full((30, 45), 7, dtype=dtype)
    linear.product_into(x_TI, output_TO, 3, 25)
    assert torch.equal(output_TO[3:25], linear(x_TI)[3:25])
    assert torch.equal(output_TO[:3], torch.full((3, 45), 7, dtype=dtype)), "nothing is written beside them"
    assert torch.equal(output_TO[25:], torch.full((5, 45), 7, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(layout: Any, dtype: torch.dtype) -> None:
    """Not even padding may carry it over: zero times infinity is no number."""
    linear = PackedLinear(random(33, 7, dtype=dtype))
    x_TI = random(5, 7, dtype=dtype)
    expected_TO = linear(x_TI)
    x_TI[2, 0], x_TI[2, 6], x_TI[4, 6] = torch.inf, torch.nan, -torch.inf
    found_TO = linear(x_TI)
    assert not found_TO[[2, 4]].isfinite().any()
    assert torch.equal(found_TO[[0, 1, 3]], expected_TO[[0, 1, 3]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit_of_a_large_product(layout: Any, dtype: torch.dtype) -> None:
    linear = PackedLinear(random(6000, 1400, dtype=dtype))
    x_TI = random(40, 1400, dtype=dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(linear(x_TI))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_padding_is_accounted_for(layout: Any) -> None:
    """An odd number of outputs is laid out in whole blocks, and that memory is real."""
    assert PackedLinear(random(33, 70, dtype=torch.float32)).nbytes > 33 * 70 * 4
    bias_bytes = 5632 * 4 if layout is PanelWeights else 0
    assert PackedLinear(random(5632, 64, dtype=torch.float32)).nbytes == 5632 * 64 * 4 + bias_bytes


def test_threads_may_share_it(layout: Any) -> None:
    linear = PackedLinear(random(64, 64, dtype=torch.float32))
    x = random(9, 64, dtype=torch.float32)
    expected = linear(x)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert all(torch.equal(found, expected) for found in threads.map(linear, [x] * 200))


def test_wrong_inputs_are_refused(layout: Any) -> None:
    linear = PackedLinear(random(8, 16, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"bfloat16 \[2, 16\]; these weights take torch.float32 \[…, 16\]"):
        linear(random(2, 16, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"\[2, 15\]"):
        linear(random(2, 15, dtype=torch.float32))
    wants_gradient = random(2, 16, dtype=torch.float32).requires_grad_()
    with pytest.raises(ValueError, match="no gradients"):
        linear(wants_gradient)
    with torch.no_grad():
        linear(wants_gradient)


def test_other_dtypes_and_devices_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"float64 weights cannot be packed here: only torch.float32 and torch.bfloat16"
    ):
        PackedLinear(random(8, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="weights on meta cannot be packed"):
        PackedLinear(torch.empty(8, 16, device="meta"))


def _missing(*_: Any) -> torch.Tensor:
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nothing is known yet of what works here, and nothing that is found out is remembered."""
    for cached in (packed_linear._layout, library._load):
        cached.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cached in (packed_linear._layout, library._load):
        cached.cache_clear()


def _break_onednn(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "has no such operators":
        monkeypatch.setattr(onednn_product.OneDnnWeights, "__init__", _missing)
    else:
        product = OneDnnWeights.product
        monkeypatch.setattr(onednn_product.OneDnnWeights, "product", lambda self, x_TI: product(self, x_TI) + 1)


@pytest.mark.parametrize("how", ["has no such operators", "was wrong by"])
def test_operators_that_do_not_work_are_found_out(
    how: str, fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setenv(ENVIRONMENT, NONE)
    _break_onednn(fresh, how)
    with caplog.at_level(logging.WARNING):
        assert not packing_available(torch.float32)
        assert not packing_available(torch.float32)
    assert sum("weights in" in record.message for record in caplog.records) == 1, "logged once"
    assert how in caplog.text


def _of_another_version(self: Any, path: Path, variant: str | None) -> None:
    raise ValueError("it was built from another version (0) of its source")


@pytest.mark.usefixtures("built_library")
@pytest.mark.parametrize(
    ("module", "name", "broken", "reason"),
    [
        (library, "_FILE", Path("not/built.so"), "was not built"),
        (library, "_FILE", Path(__file__), "cannot be loaded"),
        (library.CpuLibrary, "__init__", _of_another_version, "another version"),
        (PanelWeights, "product", lambda self, x_TI: torch.zeros(3, 48), "was wrong by"),
    ],
)
def test_onednn_takes_over_where_the_c_library_does_not_work(
    module: Any, name: str, broken: Any, reason: str, fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setattr(module, name, broken)
    with caplog.at_level(logging.INFO):
        linear = PackedLinear(random(20, 30, dtype=torch.float32))
    assert isinstance(linear._weights, OneDnnWeights)
    assert reason in caplog.text
    assert reason in describe_products(torch.float32)
    assert describe_products(torch.float32).startswith("oneDNN; ")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_c_library_is_for_one_thread(
    dtype: torch.dtype, fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if reason := panel_weights.unavailable_reason(dtype):
        pytest.skip(reason)
    weight_OI = random(20, 30, dtype=dtype)
    assert isinstance(PackedLinear(weight_OI)._weights, PanelWeights)
    fresh.setattr(torch, "get_num_threads", lambda: 3)
    with caplog.at_level(logging.INFO):
        assert isinstance(PackedLinear(weight_OI)._weights, OneDnnWeights)
    assert "torch has 3 threads" in caplog.text
    assert "torch has 3 threads" in describe_products(dtype)


@pytest.mark.usefixtures("built_library")
def test_processors_are_judged_by_their_instructions(fresh: pytest.MonkeyPatch) -> None:
    found = cpu_library()
    assert found is not None
    fresh.setattr(found, "variant", "avx2")
    fresh.setattr(found, "has_matrix_instructions", False)
    assert panel_weights.unavailable_reason(torch.float32) is None
    assert panel_weights.unavailable_reason(torch.bfloat16) is None
    assert "no product for torch.float16" in str(panel_weights.unavailable_reason(torch.float16))
    fresh.setattr(found, "has_matrix_instructions", True)
    assert panel_weights.unavailable_reason(torch.float32) is None
    assert "AMX" in str(panel_weights.unavailable_reason(torch.bfloat16))
    fresh.setattr(found, "variant", "plain")
    assert "neither AVX2 nor AVX-512" in str(panel_weights.unavailable_reason(torch.float32))
    fresh.setattr(onednn_product, "unavailable_reason", lambda dtype: "torch was built without oneDNN")
    assert panel_weights.unavailable_reason(torch.float32) is None
    assert panel_weights.unavailable_reason(torch.bfloat16) is None


@pytest.mark.usefixtures("built_library")
def test_a_variant_that_is_named_is_taken_or_refused(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(ENVIRONMENT, "plain")
    assert describe_products(torch.bfloat16) == "the C library (plain)"
    fresh.setenv(ENVIRONMENT, NONE)
    assert cpu_library() is None
    fresh.setenv(ENVIRONMENT, "sse9")
    with pytest.raises(ValueError, match=r"is 'sse9'; it may be avx512_bf16, avx512, avx2, plain, none"):
        cpu_library()
    fresh.setenv(ENVIRONMENT, "avx2")
    fresh.setattr(library, "VARIANTS", ("plain", "avx3"))
    with pytest.raises(ValueError, match="may be plain, avx3"):
        cpu_library()
    fresh.setenv(ENVIRONMENT, "avx3")
    with pytest.raises(ValueError, match="this processor runs plain"):
        cpu_library()
