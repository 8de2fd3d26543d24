import concurrent.futures
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.kernels import packed_linear
from experts.kernels.packed_linear import MAX_ROWS, PackedLinear, packing_available, padded_rows, unavailable_reason

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
@settings(max_examples=40, deadline=None)
def test_is_the_linear_layer(
    dtype: torch.dtype, with_bias: bool, leading: list[int], inputs: int, outputs: int, seed: int
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
@settings(max_examples=40, deadline=None)
def test_a_row_has_the_same_bits_in_any_batch(
    dtype: torch.dtype, rows: int, inputs: int, outputs: int, seed: int
) -> None:
    linear = PackedLinear(random(outputs, inputs, dtype=dtype, seed=seed))
    x_TI = random(rows, inputs, dtype=dtype, seed=seed + 1)
    whole = linear(x_TI)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(linear(x_TI[row : row + 1]), whole[row : row + 1])
    assert torch.equal(linear(x_TI[: (rows + 1) // 2]), whole[: (rows + 1) // 2])
    assert torch.equal(linear(x_TI.flip(0)), whole.flip(0))


def test_views_and_modes() -> None:
    weight_OI = random(24, 40, dtype=torch.float32)
    with torch.inference_mode():
        packed_in_inference = PackedLinear(weight_OI)
    x = random(6, 4, 80, dtype=torch.float32)
    plain = PackedLinear(weight_OI)(x[..., 40:].contiguous())
    assert torch.equal(packed_in_inference(x[..., 40:]), plain)
    assert torch.equal(packed_in_inference(x[:, ::2, 40:]), plain[:, ::2])
    with torch.inference_mode():
        assert torch.equal(PackedLinear(weight_OI)(x[..., 40:]), plain)


def test_the_plain_weights_are_not_needed_any_more() -> None:
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


def test_more_rows_than_one_piece_has() -> None:
    linear = PackedLinear(random(24, 40, dtype=torch.float32))
    x_TI = random(2 * MAX_ROWS + 1, 40, dtype=torch.float32)
    rows = (0, MAX_ROWS - 1, MAX_ROWS, 2 * MAX_ROWS)
    assert torch.equal(linear(x_TI)[list(rows)], torch.cat([linear(x_TI[row : row + 1]) for row in rows]))


def test_padding_is_accounted_for() -> None:
    """An odd number of outputs is laid out in whole blocks, and that memory is real."""
    assert PackedLinear(random(33, 70, dtype=torch.float32)).nbytes > 33 * 70 * 4
    assert PackedLinear(random(5632, 64, dtype=torch.float32)).nbytes == 5632 * 64 * 4


def test_threads_may_share_it() -> None:
    linear = PackedLinear(random(64, 64, dtype=torch.float32))
    x = random(9, 64, dtype=torch.float32)
    expected = linear(x)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert all(torch.equal(found, expected) for found in threads.map(linear, [x] * 200))


def test_wrong_inputs_are_refused() -> None:
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


def _wrong(weight_OI: torch.Tensor) -> torch.Tensor:
    return PACK(weight_OI + 1)


PACK = packed_linear._pack


@pytest.mark.parametrize(("broken", "reason"), [(_missing, "has no such operators"), (_wrong, "was wrong by")])
def test_operators_that_do_not_work_are_found_out(
    broken: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed_linear, "_pack", broken)
    packed_linear._why_not.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not packing_available(torch.float32)
            assert not packing_available(torch.float32)
        assert len(caplog.records) == 1, "told once"
        assert reason in caplog.text
    finally:
        packed_linear._why_not.cache_clear()
