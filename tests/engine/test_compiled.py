"""The C library computes what torch's operators compute, to the bit where only elements are rounded."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from echovlm_ray.engine import compiled
from echovlm_ray.engine.compiled import CompiledDecodes, CompiledLayerAttention, CompiledTokens, Norm
from experts.kernels.cpu.library import ENVIRONMENT, NONE, VARIANTS
from tests.cpu_variants import choose_variant

TOKENS, HEADS, KEY_VALUE_HEADS, HEAD_DIM, HIDDEN = 5, 6, 2, 16, 72
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=VARIANTS, autouse=True)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_variant(monkeypatch, request.param)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def attention(keys_SHD: torch.Tensor, values_SHD: torch.Tensor, query_heads: int) -> CompiledLayerAttention:
    norm = Norm(torch.ones(HIDDEN, dtype=keys_SHD.dtype), 1e-6)
    return CompiledLayerAttention(
        query_heads=query_heads,
        scaling=1.0,
        block_size=16,
        keys_SHD=keys_SHD,
        values_SHD=values_SHD,
        before=norm,
        after=norm,
        qkv=None,
        output=None,
    )


def decodes(*lengths: int) -> CompiledDecodes:
    blocks_BN = torch.zeros(len(lengths), 1, dtype=torch.int64)
    return CompiledDecodes(torch.arange(len(lengths)), blocks_BN, torch.tensor(lengths, dtype=torch.int64))


@pytest.mark.parametrize("head_dim", [HEAD_DIM, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_has_the_bits_of_torch(dtype: torch.dtype, head_dim: int) -> None:
    heads = HEADS + 2 * KEY_VALUE_HEADS
    qkv_TC = randn(TOKENS, heads * head_dim, dtype=dtype)
    cos_TD, sin_TD = randn(2, TOKENS, head_dim, dtype=dtype)
    slots_T = torch.tensor([3, 9, 0, 17, 4])
    keys_SHD, values_SHD = torch.zeros(2, 20, KEY_VALUE_HEADS, head_dim, dtype=dtype)
    query_THD = torch.empty(TOKENS, HEADS, head_dim, dtype=dtype)
    tokens = CompiledTokens(cos_TD, sin_TD, slots_T, decodes())
    attention(keys_SHD, values_SHD, HEADS).rotate_and_store(tokens, qkv_TC, query_THD)
    qkv_THD = qkv_TC.view(TOKENS, heads, head_dim)
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
    compiled.normalize(Norm(norm.weight.data, 1e-6), x_TD, found_TD)
    torch.testing.assert_close(found_TD, norm(x_TD).detach())


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixture(dtype: torch.dtype) -> None:
    hidden_TD, routed_TD, shared_TD, dense_TD = randn(4, TOKENS, HIDDEN, dtype=dtype)
    projected_TF = 3 * randn(TOKENS, 10, dtype=dtype)
    found_TD = torch.empty_like(hidden_TD)
    compiled.mix(hidden_TD, routed_TD, shared_TD, dense_TD, projected_TF, 7, found_TD)
    share_T2 = F.softmax(projected_TF[:, 8:], dim=-1)
    mixture_TD = routed_TD + F.sigmoid(projected_TF[:, 7:8]) * shared_TD
    torch.testing.assert_close(found_TD, hidden_TD + (share_T2[:, :1] * mixture_TD + share_T2[:, 1:] * dense_TD))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_is_passed_on(dtype: torch.dtype) -> None:
    """NaN must be propagated, because a rollout is rolled back for it."""
    bad_TD = randn(2, HIDDEN, dtype=dtype)
    bad_TD[1, 3] = torch.nan
    x_TD = torch.empty_like(bad_TD)
    compiled.normalize(Norm(torch.ones(HIDDEN, dtype=dtype), 1e-6), bad_TD, x_TD)
    assert x_TD[1].isnan().all()
    assert not x_TD[0].isnan().any()
    good_TD, mixed_TD = torch.zeros_like(x_TD), torch.empty_like(x_TD)
    coefficients_T3 = torch.zeros(2, 3, dtype=dtype)
    compiled.mix(good_TD, bad_TD, good_TD, good_TD, coefficients_T3, 0, mixed_TD)
    assert mixed_TD[1, 3].isnan()
    for column in range(3):
        coefficients_T3[0, column] = torch.nan
        ones_TD = torch.ones_like(good_TD)
        compiled.mix(good_TD, ones_TD, ones_TD, ones_TD, coefficients_T3, 0, mixed_TD)
        assert mixed_TD[0].isnan().all()
        coefficients_T3[0, column] = 0
    query_THD = torch.zeros(1, 1, 8, dtype=dtype)
    keys_SHD, values_SHD = torch.zeros(2, 16, 1, 8, dtype=dtype)
    rotation_TD = torch.ones(1, 8, dtype=dtype)
    tokens = CompiledTokens(rotation_TD, rotation_TD, torch.tensor([6]), decodes(7))
    for cache_SHD in (keys_SHD, values_SHD):
        for slot in range(7):
            cache_SHD[slot] = torch.nan
            output_THD = torch.zeros_like(query_THD)
            attention(keys_SHD, values_SHD, 1).attend_decoding(tokens, query_THD, output_THD)
            assert output_THD.isnan().all()
            cache_SHD[slot] = 0


def test_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert compiled.use_compiled(torch.float32, cpu)
    assert compiled.use_compiled(torch.bfloat16, cpu)
    assert not compiled.use_compiled(torch.float16, cpu)
    assert not compiled.use_compiled(torch.float32, torch.device("meta"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not compiled.use_compiled(torch.float32, cpu)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv(ENVIRONMENT, NONE)
    assert not compiled.use_compiled(torch.float32, cpu)
