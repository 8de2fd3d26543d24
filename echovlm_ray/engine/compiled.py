"""The small arithmetic of a decoder layer on a CPU, each in one compiled loop instead of many operators of torch.

A decoding step has few rows, so an operator costs more to call than to compute, and attention through torch first
copies every sequence's keys and values out of their blocks. See `experts.kernels.compiled` for what the functions
promise; attention keeps its weights in float32.
"""

from typing import Any

import numpy as np
import torch

from experts.kernels import expert_arithmetic
from experts.kernels.compiled import (
    SUMMING,
    Array,
    Ints,
    as_array,
    compiled,
    exp,
    inlined,
    load,
    one_process_at_a_time,
    rounded,
    stored,
)
from experts.kernels.compiled_product import multiply
from experts.kernels.expert_arithmetic import swiglu

_DTYPES = (torch.float32, torch.bfloat16)


def pays(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the functions below take tensors of a dtype on a device, and are faster than torch's operators.

    They use one thread; where torch was given more, its operators are the faster ones for long prompts.
    """
    return device.type == "cpu" and dtype in _DTYPES and torch.get_num_threads() == 1


def prepare(dtype: torch.dtype) -> None:
    """Compiles all functions that a step uses, or takes up the code that is kept, so that no request waits for it."""
    expert_arithmetic.prepare(dtype)
    zeros_1D = as_array(torch.zeros(1, 4, dtype=dtype))
    zeros_11D = zeros_1D[None]
    zeros_1: Ints = np.zeros(1, dtype=np.int64)
    qkv_1C = as_array(torch.zeros(1, 12, dtype=dtype))
    with one_process_at_a_time():
        rotate_and_store(qkv_1C, zeros_1D, zeros_1D, zeros_1, zeros_11D, zeros_11D, zeros_11D)
        attend_decoding(zeros_11D, zeros_1, zeros_1[None], zeros_1 + 1, zeros_11D, zeros_11D, 1.0, 1, zeros_11D)
        normalize(zeros_1D, zeros_1D[0], 1.0, zeros_1D)
        mix(zeros_1D, zeros_1D, zeros_1D, zeros_1D, zeros_1D, 0, zeros_1D)
        # Without rows no product is computed, and nothing needs to be described.
        none_0D, none_0C, none_I = zeros_1D[:0], qkv_1C[:0], zeros_1[:0]
        rest = zeros_11D, zeros_11D, none_I, none_I[None], none_I, 1.0, 1, zeros_11D[:0], zeros_11D[:0]
        attend_to_sequences(none_0D, zeros_1D[0], 1.0, none_I, none_0D, none_0D, none_I, *rest)
        project_and_normalize(none_0D, none_0D, none_I, zeros_1D[0], 1.0, none_0D, none_0D)
        dense_and_shared(none_0D, none_I, none_I, none_I, 2, 2, none_0C, none_0D, none_0D)


@inlined()
def _rotate(x_D: Any, cos_D: Any, sin_D: Any, output_D: Any) -> None:
    half = len(x_D) // 2
    low_D, high_D = x_D[:half], x_D[half:]
    low_cos_D, high_cos_D = cos_D[:half], cos_D[half:]
    low_sin_D, high_sin_D = sin_D[:half], sin_D[half:]
    low_output_D, high_output_D = output_D[:half], output_D[half:]
    for d in range(half):
        low, high = load(low_D[d]), load(high_D[d])
        low_sum = rounded(low * load(low_cos_D[d]), x_D) - rounded(high * load(low_sin_D[d]), x_D)
        high_sum = rounded(high * load(high_cos_D[d]), x_D) + rounded(low * load(high_sin_D[d]), x_D)
        low_output_D[d] = stored(low_sum, output_D)
        high_output_D[d] = stored(high_sum, output_D)


@compiled()
def rotate_and_store(
    qkv_TC: Array,
    cos_TD: Array,
    sin_TD: Array,
    slots_T: Ints,
    keys_SHD: Array,
    values_SHD: Array,
    query_THD: Array,
) -> None:
    """Rotary positions; new keys and values go into the cache, queries into a tensor of their own.

    Rounds as `x * cos + rotate_half(x) * sin` does.

    Args:
        qkv_TC: tokens × (query heads + twice key-value heads) · head_dim.
        cos_TD: tokens × head_dim.
        sin_TD: tokens × head_dim.
        slots_T: each token's place in the cache.
        keys_SHD: one layer's cache: slots × key-value heads × head_dim; written.
        values_SHD: the same for values; written.
        query_THD: tokens × query heads × head_dim; written.
    """
    num_tokens, num_heads, head_dim = query_THD.shape
    kv_heads = keys_SHD.shape[1]
    qkv_THD = qkv_TC.reshape(num_tokens, num_heads + 2 * kv_heads, head_dim)
    for t in range(num_tokens):
        slot = slots_T[t]
        for head in range(num_heads):
            _rotate(qkv_THD[t, head], cos_TD[t], sin_TD[t], query_THD[t, head])
        for head in range(kv_heads):
            _rotate(qkv_THD[t, num_heads + head], cos_TD[t], sin_TD[t], keys_SHD[slot, head])
            values_SHD[slot, head] = qkv_THD[t, num_heads + kv_heads + head]


@inlined(fastmath=SUMMING)
def _score(query_GD: Any, key_KHD: Any, head: Any, score_GK: Any) -> None:
    """The scores of a group's queries with the keys of one block. Four keys at once, for the processor's sake."""
    group, head_dim = query_GD.shape
    count = len(key_KHD)
    whole = count - count % 4
    for k in range(0, whole, 4):
        key_0_D, key_1_D = key_KHD[k, head], key_KHD[k + 1, head]
        key_2_D, key_3_D = key_KHD[k + 2, head], key_KHD[k + 3, head]
        for g in range(group):
            query_D, score_K = query_GD[g], score_GK[g]
            score_0, score_1, score_2, score_3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for d in range(head_dim):
                score_0 += query_D[d] * load(key_0_D[d])
                score_1 += query_D[d] * load(key_1_D[d])
                score_2 += query_D[d] * load(key_2_D[d])
                score_3 += query_D[d] * load(key_3_D[d])
            score_K[k], score_K[k + 1], score_K[k + 2], score_K[k + 3] = score_0, score_1, score_2, score_3
    for k in range(whole, count):
        key_D = key_KHD[k, head]
        for g in range(group):
            query_D = query_GD[g]
            score = np.float32(0)
            for d in range(head_dim):
                score += query_D[d] * load(key_D[d])
            score_GK[g, k] = score


@inlined(fastmath=SUMMING)
def _add_values(weight_GK: Any, value_KHD: Any, head: Any, total_GD: Any) -> None:
    """Adds the weighted values of one block to a group's sums."""
    group, head_dim = total_GD.shape
    count = len(value_KHD)
    whole = count - count % 4
    for k in range(0, whole, 4):
        value_0_D, value_1_D = value_KHD[k, head], value_KHD[k + 1, head]
        value_2_D, value_3_D = value_KHD[k + 2, head], value_KHD[k + 3, head]
        for g in range(group):
            weight_K, total_D = weight_GK[g], total_GD[g]
            weight_0, weight_1, weight_2, weight_3 = weight_K[k], weight_K[k + 1], weight_K[k + 2], weight_K[k + 3]
            for d in range(head_dim):
                total_D[d] += (
                    weight_0 * load(value_0_D[d])
                    + weight_1 * load(value_1_D[d])
                    + weight_2 * load(value_2_D[d])
                    + weight_3 * load(value_3_D[d])
                )
    for k in range(whole, count):
        value_D = value_KHD[k, head]
        for g in range(group):
            weight, total_D = weight_GK[g, k], total_GD[g]
            for d in range(head_dim):
                total_D[d] += weight * load(value_D[d])


@inlined(fastmath=SUMMING)
def _softmax(score_K: Any) -> None:
    highest = score_K[0]
    for k in range(len(score_K)):
        highest = max(highest, score_K[k])
    total = np.float32(0)
    for k in range(len(score_K)):
        score_K[k] = exp(score_K[k] - highest)
        total += score_K[k]
    factor = np.float32(1) / total
    for k in range(len(score_K)):
        score_K[k] *= factor


@compiled(fastmath=SUMMING)
def attend_decoding(
    query_THD: Array,
    rows_B: Ints,
    block_tables_BN: Ints,
    lengths_B: Ints,
    keys_SHD: Array,
    values_SHD: Array,
    scaling: float,
    block_size: int,
    output_THD: Array,
) -> None:
    """One query token of each of several sequences attends to its sequence's tokens, where they lie in the cache.

    Paged attention (Kwon et al. 2023, arXiv 2309.06180) with grouped queries; sums and softmax in float32.

    Args:
        query_THD: the step's tokens × query heads × head_dim.
        rows_B: which of them decode.
        block_tables_BN: the blocks of each sequence; what stands behind the last does not matter.
        lengths_B: how many tokens each sequence has, the new one included.
        keys_SHD: one layer's cache: slots × key-value heads × head_dim.
        values_SHD: the same for values.
        scaling: of the scores.
        block_size: slots of a block.
        output_THD: as `query_THD`; written in `rows_B`.
    """
    num_heads, head_dim = query_THD.shape[1:]
    group = num_heads // keys_SHD.shape[1]
    query_GD = np.empty((group, head_dim), np.float32)
    total_GD = np.empty((group, head_dim), np.float32)
    score_GK = np.empty((group, lengths_B.max()), np.float32)
    for b in range(len(rows_B)):
        row, length = rows_B[b], lengths_B[b]
        for head in range(keys_SHD.shape[1]):
            for g in range(group):
                for d in range(head_dim):
                    query_GD[g, d] = load(query_THD[row, head * group + g, d]) * np.float32(scaling)
                    total_GD[g, d] = 0
            for start in range(0, length, block_size):
                slot = block_tables_BN[b, start // block_size] * block_size
                end = slot + min(block_size, length - start)
                _score(query_GD, keys_SHD[slot:end], head, score_GK[:, start:])
            for g in range(group):
                _softmax(score_GK[g, :length])
            for start in range(0, length, block_size):
                slot = block_tables_BN[b, start // block_size] * block_size
                end = slot + min(block_size, length - start)
                _add_values(score_GK[:, start:], values_SHD[slot:end], head, total_GD)
            for g in range(group):
                for d in range(head_dim):
                    output_THD[row, head * group + g, d] = stored(total_GD[g, d], output_THD)


@compiled(fastmath=SUMMING)
def normalize(x_TD: Array, weight_D: Array, epsilon: float, output_TD: Array) -> None:
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), rounded as Qwen2-VL's: before and after the weight.

    Args:
        x_TD: tokens × hidden.
        weight_D: hidden.
        epsilon: added to the mean square.
        output_TD: as `x_TD`; written.
    """
    num_tokens, hidden_size = x_TD.shape
    for t in range(num_tokens):
        squares = np.float32(0)
        for d in range(hidden_size):
            x = load(x_TD[t, d])
            squares += x * x
        factor = np.float32(1) / np.sqrt(squares / np.float32(hidden_size) + np.float32(epsilon))
        for d in range(hidden_size):
            scaled = rounded(load(x_TD[t, d]) * factor, x_TD)
            output_TD[t, d] = stored(load(weight_D[d]) * scaled, output_TD)


@compiled()
def attend_to_sequences(
    hidden_TD: Array,
    norm_D: Array,
    epsilon: float,
    qkv_I: Ints,
    cos_TD: Array,
    sin_TD: Array,
    slots_T: Ints,
    keys_SHD: Array,
    values_SHD: Array,
    rows_B: Ints,
    block_tables_BN: Ints,
    lengths_B: Ints,
    scaling: float,
    block_size: int,
    query_THD: Array,
    attended_THD: Array,
) -> None:
    """A layer up to its attention: `normalize`, one product, `rotate_and_store`, and `attend_decoding`.

    Args:
        hidden_TD: tokens × hidden.
        norm_D: the weight of the norm before the attention.
        epsilon: its epsilon.
        qkv_I: describes the weights for queries, keys and values, see `experts.kernels.compiled_product`.
        cos_TD: see `rotate_and_store`.
        sin_TD: see there.
        slots_T: see there.
        keys_SHD: see there.
        values_SHD: see there.
        rows_B: see `attend_decoding`; none where no token attends by itself.
        block_tables_BN: see there.
        lengths_B: see there.
        scaling: see there.
        block_size: see there.
        query_THD: tokens × query heads × head_dim; written.
        attended_THD: the same, written in `rows_B`.
    """
    num_tokens, num_heads, head_dim = query_THD.shape
    x_TD = np.empty_like(hidden_TD)
    normalize(hidden_TD, norm_D, epsilon, x_TD)
    qkv_TC = np.empty((num_tokens, (num_heads + 2 * keys_SHD.shape[1]) * head_dim), hidden_TD.dtype)
    multiply(qkv_I, x_TD, 0, num_tokens, qkv_TC)
    rotate_and_store(qkv_TC, cos_TD, sin_TD, slots_T, keys_SHD, values_SHD, query_THD)
    if len(rows_B):
        attend_decoding(
            query_THD, rows_B, block_tables_BN, lengths_B, keys_SHD, values_SHD, scaling, block_size, attended_THD
        )


@compiled()
def project_and_normalize(
    hidden_TD: Array,
    attended_TD: Array,
    output_I: Ints,
    norm_D: Array,
    epsilon: float,
    residual_TD: Array,
    x_TD: Array,
) -> None:
    """A layer from its attention to its experts: one product, the residual sum, and `normalize`.

    Args:
        hidden_TD: tokens × hidden: the layer's input.
        attended_TD: tokens × heads · head_dim.
        output_I: describes the weights of the attention's output, see `experts.kernels.compiled_product`.
        norm_D: the weight of the norm before the experts.
        epsilon: its epsilon.
        residual_TD: the sum; written.
        x_TD: what the norm makes of it; written.
    """
    num_tokens, hidden_size = hidden_TD.shape
    multiply(output_I, attended_TD, 0, num_tokens, residual_TD)
    for t in range(num_tokens):
        for d in range(hidden_size):
            residual_TD[t, d] = stored(load(hidden_TD[t, d]) + load(residual_TD[t, d]), residual_TD)
    normalize(residual_TD, norm_D, epsilon, x_TD)


@compiled()
def dense_and_shared(
    x_TD: Array,
    inputs_I: Ints,
    dense_down_I: Ints,
    shared_down_I: Ints,
    dense_size: int,
    shared_size: int,
    projected_TF: Array,
    dense_TD: Array,
    shared_TD: Array,
) -> None:
    """Dense MLP and shared expert, the latter before its gate.

    Args:
        x_TD: tokens × hidden.
        inputs_I: describes all weights that read x, gate and up of the dense MLP first, then those of the shared
            expert; see `experts.kernels.compiled_product`.
        dense_down_I: describes the down of the dense MLP.
        shared_down_I: describes that of the shared expert.
        dense_size: inner size of the dense MLP.
        shared_size: inner size of the shared expert.
        projected_TF: tokens × outputs of the first product; written.
        dense_TD: tokens × hidden; written.
        shared_TD: tokens × hidden; written.
    """
    num_tokens = len(x_TD)
    multiply(inputs_I, x_TD, 0, num_tokens, projected_TF)
    dense_TF = np.empty((num_tokens, dense_size), x_TD.dtype)
    swiglu(projected_TF, 0, dense_size, dense_TF)
    multiply(dense_down_I, dense_TF, 0, num_tokens, dense_TD)
    shared_TF = np.empty((num_tokens, shared_size), x_TD.dtype)
    swiglu(projected_TF, 2 * dense_size, 2 * dense_size + shared_size, shared_TF)
    multiply(shared_down_I, shared_TF, 0, num_tokens, shared_TD)


@compiled()
def mix(
    hidden_TD: Array,
    routed_TD: Array,
    shared_TD: Array,
    dense_TD: Array,
    projected_TF: Array,
    factor_column: int,
    output_TD: Array,
) -> None:
    """What ends a layer: residual + share₀ · (routed + σ(factor) · shared) + share₁ · dense, with softmax shares.

    Args:
        hidden_TD: tokens × hidden: the residual.
        routed_TD: the routed experts' output.
        shared_TD: the shared expert's, before its gate.
        dense_TD: the dense MLP's.
        projected_TF: tokens × outputs of the product that computed, among others, the next argument's columns.
        factor_column: where three columns begin: the shared expert's gate, and the two mixing coefficients.
        output_TD: as `hidden_TD`; written.
    """
    num_tokens, hidden_size = hidden_TD.shape
    for t in range(num_tokens):
        factor = load(projected_TF[t, factor_column])
        routed_coefficient = load(projected_TF[t, factor_column + 1])
        dense_coefficient = load(projected_TF[t, factor_column + 2])
        highest = max(routed_coefficient, dense_coefficient)
        routed_power = np.exp(routed_coefficient - highest)
        dense_power = np.exp(dense_coefficient - highest)
        shared_gate = rounded(np.float32(1) / (np.float32(1) + np.exp(-factor)), hidden_TD)
        routed_share = rounded(routed_power / (routed_power + dense_power), hidden_TD)
        dense_share = rounded(dense_power / (routed_power + dense_power), hidden_TD)
        for d in range(hidden_size):
            shared = rounded(shared_gate * load(shared_TD[t, d]), hidden_TD)
            mixture = rounded(load(routed_TD[t, d]) + shared, hidden_TD)
            from_routed = rounded(routed_share * mixture, hidden_TD)
            from_dense = rounded(dense_share * load(dense_TD[t, d]), hidden_TD)
            added = rounded(from_routed + from_dense, hidden_TD)
            output_TD[t, d] = stored(load(hidden_TD[t, d]) + added, output_TD)
