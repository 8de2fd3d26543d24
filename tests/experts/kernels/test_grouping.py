import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.kernels.grouping import order_pairs, sum_over_k


@given(st.integers(0, 6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 1000))
def test_pairs_are_ordered_by_expert_within_each_token(tokens: int, top_k: int, experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    index_TK = torch.randint(-1, experts, (tokens, top_k), generator=generator, dtype=torch.int32)
    weight_TK = torch.rand((tokens, top_k), generator=generator)
    weight_TK[index_TK < 0] = float("nan")
    pairs = order_pairs(index_TK, weight_TK, experts)
    assert pairs.expert_TK.dtype == torch.int32
    for token in range(tokens):
        there = [(e, w) for e, w in zip(index_TK[token].tolist(), weight_TK[token].tolist(), strict=True) if e >= 0]
        there.sort(key=lambda pair: pair[0])
        there += [(experts, 0.0)] * (top_k - len(there))
        assert list(zip(pairs.expert_TK[token].tolist(), pairs.weight_TK[token].tolist(), strict=True)) == there


def test_sums_are_taken_in_float32_and_in_order() -> None:
    part_TKD = torch.tensor([[[256.0], [1.0], [1.0]]]).bfloat16()
    assert sum_over_k(part_TKD).item() == 258, "in bfloat16 256 + 1 is 256"
    large = torch.tensor([[[1.0], [1e8], [-1e8]], [[1e8], [-1e8], [1.0]]])
    assert sum_over_k(large).flatten().tolist() == [0, 1]
