"""Paged attention equals attention over each sequence alone, to the bit, in every batch."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from echovlm_ray.engine.attention import AttentionStep, SequenceSpan, _attend, attend_prefills, padded_context
from echovlm_ray.engine.compiled import CompiledLayerAttention, CompiledTokens, Norm
from echovlm_ray.engine.kv_cache import BLOCK_SIZE, KVCache
from experts.kernels.cpu.library import VARIANTS
from tests.cpu_variants import choose_variant, need_library

HEADS, KEY_VALUE_HEADS, HEAD_DIM = 6, 2, 16


def filled_cache(*, compiled: bool, dtype: torch.dtype = torch.float32, num_blocks: int = 64) -> KVCache:
    if compiled:
        need_library()
    cache = KVCache(
        num_layers=1,
        num_blocks=num_blocks,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=torch.device("cpu"),
        compiled=compiled,
    )
    generator = torch.Generator().manual_seed(0)
    cache.key_LSHD.copy_(torch.randn(cache.key_LSHD.shape, generator=generator))
    cache.value_LSHD.copy_(torch.randn(cache.value_LSHD.shape, generator=generator))
    return cache


def spans_of(lengths: list[tuple[int, int]]) -> list[SequenceSpan]:
    """(tokens before, new tokens) of each; blocks are dealt out in turn, so that no sequence's are in order."""
    spans: list[SequenceSpan] = []
    row, block = 0, 63
    for before, new in lengths:
        count = -(-(before + new) // BLOCK_SIZE)
        spans.append(SequenceSpan(row, before, before + new, list(range(block, block - count, -1)), before + new))
        row, block = row + new, block - count
    return spans


def attend(cache: KVCache, spans: list[SequenceSpan], query_THD: torch.Tensor) -> torch.Tensor:
    step = AttentionStep.plan(cache, spans)
    scaling = HEAD_DIM**-0.5
    if not cache.compiled:
        return _attend(step, 0, query_THD, scaling)
    assert step.compiled_decodes is not None
    # Nothing is rotated or stored, and nothing normalized.
    unused = query_THD.new_zeros(0)
    layer = CompiledLayerAttention(
        query_heads=HEADS,
        scaling=scaling,
        block_size=BLOCK_SIZE,
        keys_SHD=cache.key_LSHD[0],
        values_SHD=cache.value_LSHD[0],
        before=Norm(unused, 1e-6),
        after=Norm(unused, 1e-6),
        qkv=None,
        output=None,
    )
    output_THD = torch.full_like(query_THD, torch.nan)
    layer.attend_decoding(CompiledTokens(unused, unused, step.new_slots, step.compiled_decodes), query_THD, output_THD)
    attend_prefills(step, 0, query_THD, scaling, output_THD)
    return output_THD


def expected(cache: KVCache, span: SequenceSpan, query_THD: torch.Tensor) -> torch.Tensor:
    keys, values = cache.read(0, cache.slots(span.block_table, 0, span.end))
    scores = torch.einsum("qhd,khd->hqk", query_THD, keys.repeat_interleave(3, 1)) * HEAD_DIM**-0.5
    later = torch.ones(span.end - span.start, span.end, dtype=torch.bool).triu(span.start + 1)
    weights = F.softmax(scores.masked_fill(later, -torch.inf), dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(3, 1))


lengths = st.lists(
    st.tuples(st.integers(0, 70), st.sampled_from([1, 1, 1, 2, 17])).filter(lambda pair: sum(pair) > 0),
    min_size=1,
    max_size=8,
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("compiled", [True, False])
@settings(deadline=None)
@given(parts=lengths)
def test_as_attention_over_each_sequence(compiled: bool, parts: list[tuple[int, int]]) -> None:
    cache, spans = filled_cache(compiled=compiled), spans_of(parts)
    query_THD = torch.randn(spans[-1].row + parts[-1][1], HEADS, HEAD_DIM)
    found = attend(cache, spans, query_THD)
    for span in spans:
        rows = slice(span.row, span.row + span.end - span.start)
        torch.testing.assert_close(found[rows], expected(cache, span, query_THD[rows]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("one_thread")
def test_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype, compiled: bool) -> None:
    cache = filled_cache(compiled=compiled, dtype=dtype)
    spans = spans_of([(40, 1), (97, 1), (3, 5), (41, 1), (200, 1), (0, 1)])
    query_THD = torch.randn(10, HEADS, HEAD_DIM).to(dtype)
    together = attend(cache, spans, query_THD)
    for span in spans:
        rows = slice(span.row, span.row + span.end - span.start)
        alone = SequenceSpan(0, span.start, span.end, span.block_table, span.num_prompt)
        assert torch.equal(attend(cache, [alone], query_THD[rows]), together[rows])


@pytest.mark.parametrize("compiled", [True, False])
def test_what_others_left_in_the_cache_does_no_harm(compiled: bool) -> None:
    cache, spans = filled_cache(compiled=compiled), spans_of([(20, 1), (18, 1)])
    query_THD = torch.randn(2, HEADS, HEAD_DIM)
    before = attend(cache, spans, query_THD)
    used = torch.cat([cache.slots(span.block_table, 0, span.end) for span in spans])
    unused = torch.ones(cache.key_LSHD.shape[1], dtype=torch.bool).index_fill(0, used, False)
    cache.key_LSHD[0, unused] = torch.nan
    cache.value_LSHD[0, unused] = torch.nan
    assert torch.equal(attend(cache, spans, query_THD), before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_as_with_the_operators_of_torch(
    dtype: torch.dtype, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_variant(monkeypatch, variant)
    spans = spans_of([(40, 1), (97, 1), (3, 5), (0, 1)])
    query_THD = torch.randn(8, HEADS, HEAD_DIM).to(dtype)
    found, expected = (attend(filled_cache(compiled=each, dtype=dtype), spans, query_THD) for each in (True, False))
    # torch rounds the weights to bfloat16 before it adds up the values.
    torch.testing.assert_close(found, expected, rtol=1.6e-2, atol=1e-5 if dtype == torch.float32 else 2e-3)


@given(st.integers(1, 5000))
def test_few_sizes_of_padded_contexts(num_tokens: int) -> None:
    padded = padded_context(num_tokens)
    assert num_tokens <= padded < max(num_tokens + BLOCK_SIZE, 1.25 * num_tokens)
    assert padded_context(padded) == padded
    assert padded % BLOCK_SIZE == 0


def test_slots_follow_the_block_table() -> None:
    slots = KVCache.slots([7, 2, 5], 14, 35)
    assert slots.tolist() == [7 * 16 + 14, 7 * 16 + 15, *range(32, 48), *range(80, 83)]
