"""Compiled functions compute what torch's operators compute, to the bit where only elements are rounded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from echovlm_ray.engine import compiled
from experts.kernels import expert_arithmetic
from experts.kernels.compiled import as_array
from tests.engines import engine_request, local_experts, run_together, running_engine
from tests.golden_cases import golden_rows
from tests.split_golden import split_golden

TOKENS, HEADS, KEY_VALUE_HEADS, HEAD_DIM, HIDDEN = 5, 6, 2, 16, 72
DTYPES = (torch.float32, torch.bfloat16)

FUNCTIONS: dict[str, Any] = {
    name: getattr(module, name)
    for module, names in {
        compiled: (
            "rotate_and_store",
            "attend_decoding",
            "normalize",
            "mix",
            "attend_to_sequences",
            "project_and_normalize",
            "dense_and_shared",
        ),
        expert_arithmetic: ("gather_pairs", "swiglu", "add_pairs", "compute_experts"),
    }.items()
    for name in names
}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_has_the_bits_of_torch(dtype: torch.dtype) -> None:
    heads = HEADS + 2 * KEY_VALUE_HEADS
    qkv_TC = randn(TOKENS, heads * HEAD_DIM, dtype=dtype)
    cos_TD, sin_TD = randn(2, TOKENS, HEAD_DIM, dtype=dtype)
    slots_T = torch.tensor([3, 9, 0, 17, 4])
    keys_SHD, values_SHD = torch.zeros(2, 20, KEY_VALUE_HEADS, HEAD_DIM, dtype=dtype)
    query_THD = torch.empty(TOKENS, HEADS, HEAD_DIM, dtype=dtype)
    compiled.rotate_and_store(
        as_array(qkv_TC),
        as_array(cos_TD),
        as_array(sin_TD),
        slots_T.numpy(),
        as_array(keys_SHD),
        as_array(values_SHD),
        as_array(query_THD),
    )
    qkv_THD = qkv_TC.view(TOKENS, heads, HEAD_DIM)
    low_THD, high_THD = qkv_THD.chunk(2, dim=-1)
    rotated_THD = qkv_THD * cos_TD[:, None] + torch.cat([-high_THD, low_THD], dim=-1) * sin_TD[:, None]
    assert torch.equal(query_THD, rotated_THD[:, :HEADS])
    assert torch.equal(keys_SHD[slots_T], rotated_THD[:, HEADS:-KEY_VALUE_HEADS])
    assert torch.equal(values_SHD[slots_T], qkv_THD[:, -KEY_VALUE_HEADS:])
    others = torch.ones(20, dtype=torch.bool).index_fill(0, slots_T, False)
    assert not keys_SHD[others].any()
    assert not values_SHD[others].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype: torch.dtype) -> None:
    norm = Qwen2VLRMSNorm(HIDDEN, eps=1e-6).to(dtype)
    norm.weight.data.copy_(randn(HIDDEN))
    x_TD = 3 * randn(TOKENS, HIDDEN, dtype=dtype)
    found_TD = torch.empty_like(x_TD)
    compiled.normalize(as_array(x_TD), as_array(norm.weight.data), 1e-6, as_array(found_TD))
    torch.testing.assert_close(found_TD, norm(x_TD).detach())


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixture(dtype: torch.dtype) -> None:
    hidden_TD, routed_TD, shared_TD, dense_TD = randn(4, TOKENS, HIDDEN, dtype=dtype)
    projected_TF = 3 * randn(TOKENS, 10, dtype=dtype)
    found_TD = torch.empty_like(hidden_TD)
    compiled.mix(
        as_array(hidden_TD),
        as_array(routed_TD),
        as_array(shared_TD),
        as_array(dense_TD),
        as_array(projected_TF),
        7,
        as_array(found_TD),
    )
    share_T2 = F.softmax(projected_TF[:, 8:], dim=-1)
    mixture_TD = routed_TD + F.sigmoid(projected_TF[:, 7:8]) * shared_TD
    torch.testing.assert_close(found_TD, hidden_TD + (share_T2[:, :1] * mixture_TD + share_T2[:, 1:] * dense_TD))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_is_passed_on(dtype: torch.dtype) -> None:
    """A rollout is taken back because of it, so that it must not be lost on the way."""
    bad_TD = randn(2, HIDDEN, dtype=dtype)
    bad_TD[1, 3] = torch.nan
    x_TD, weight_D = torch.empty_like(bad_TD), torch.ones(HIDDEN, dtype=dtype)
    compiled.normalize(as_array(bad_TD), as_array(weight_D), 1e-6, as_array(x_TD))
    assert x_TD[1].isnan().all()
    mixed_TD = torch.empty_like(x_TD)
    good_TD = torch.zeros_like(x_TD)
    coefficients_T3 = torch.zeros(2, 3, dtype=dtype)
    good, bad, coefficients = as_array(good_TD), as_array(bad_TD), as_array(coefficients_T3)
    compiled.mix(good, bad, good, good, coefficients, 0, as_array(mixed_TD))
    assert mixed_TD[1, 3].isnan()
    query_THD = torch.zeros(1, 1, 8, dtype=dtype)
    keys_SHD, values_SHD = torch.zeros(2, 16, 1, 8, dtype=dtype)
    for cache_SHD in (keys_SHD, values_SHD):
        cache_SHD[2] = torch.nan
        output_THD = torch.zeros_like(query_THD)
        first, length = np.array([0]), np.array([7])
        keys, values = as_array(keys_SHD), as_array(values_SHD)
        output = as_array(output_THD)
        compiled.attend_decoding(as_array(query_THD), first, first[None], length, keys, values, 1.0, 16, output)
        assert output_THD.isnan().all()
        cache_SHD[2] = 0
    assert not x_TD[0].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_left_to_be_compiled(dtype: torch.dtype, golden_dir: Path, tmp_path: Path) -> None:
    """After the preparation an engine meets no types that are new."""
    variant = "base" if dtype == torch.float32 else "bf16"
    split = split_golden(golden_dir / variant / "checkpoint", tmp_path, {"breast": range(4)}, "organs")
    compiled.prepare(dtype)
    known = {name: len(function.signatures) for name, function in FUNCTIONS.items()}
    row = next(iter(golden_rows(golden_dir, variant)))
    with running_engine(split, local_experts(split)) as engine:
        request = engine_request(row, split, golden_dir / variant / "checkpoint", (("breast", 1.0),))
        assert run_together(engine, [request])[0].token_ids
    assert {name: len(function.signatures) for name, function in FUNCTIONS.items()} == known


def test_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert compiled.pays(torch.float32, cpu)
    assert compiled.pays(torch.bfloat16, cpu)
    assert not compiled.pays(torch.float16, cpu)
    assert not compiled.pays(torch.float32, torch.device("meta"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not compiled.pays(torch.float32, cpu)
