"""What surrounds the products of a layer's experts, compiled: see `experts.kernels.compiled`."""

import functools

import numpy as np
import torch

from experts.kernels.compiled import Array, Ints, as_array, compiled, exp, load, one_process_at_a_time, rounded, stored
from experts.kernels.compiled_product import multiply


@functools.cache
def prepare(dtype: torch.dtype) -> None:
    """Compiles all functions for a dtype, or takes up the code that is kept, so that no exchange waits for it."""
    x_TD = as_array(torch.zeros(1, 4, dtype=dtype))
    starts_E: Ints = np.zeros(2, dtype=np.int64)
    pair_P: Ints = np.zeros(1, dtype=np.int64)
    with one_process_at_a_time():
        gather_pairs(pair_P[None], x_TD, starts_E, pair_P, x_TD.copy())
        swiglu(x_TD, 0, 2, x_TD[:, :2].copy())
        add_pairs(x_TD, pair_P, 1, x_TD[:, :1].copy(), x_TD.copy())
        no_experts: Ints = np.zeros((0, 1), dtype=np.int64)
        compute_experts(pair_P[None] - 1, x_TD, x_TD[:, :1].copy(), no_experts, no_experts, 2, x_TD.copy())


@compiled()
def gather_pairs(index_TK: Ints, x_TD: Array, starts_E: Ints, pair_P: Ints, x_PD: Array) -> None:
    """Sorts the pairs of a token and an expert by expert, those of one expert by token, and gathers their rows.

    Args:
        index_TK: the expert of every pair; below 0 for none.
        x_TD: tokens × hidden.
        starts_E: one more than there are experts: where each expert's pairs begin, and where the last one's end;
            written.
        pair_P: as many as there are pairs: t · K + k of each that has an expert; written.
        x_PD: each such pair's row; written.

    Raises:
        IndexError: there is no such expert.
    """
    num_tokens, top_k = index_TK.shape
    num_experts = len(starts_E) - 1
    starts_E[:] = 0
    for t in range(num_tokens):
        for k in range(top_k):
            if index_TK[t, k] >= num_experts:
                raise IndexError("an expert's index is too large")
            if index_TK[t, k] >= 0:
                starts_E[index_TK[t, k] + 1] += 1
    for expert in range(num_experts):
        starts_E[expert + 1] += starts_E[expert]
    next_E = starts_E[:num_experts].copy()
    for t in range(num_tokens):
        for k in range(top_k):
            expert = index_TK[t, k]
            if expert >= 0:
                place = next_E[expert]
                next_E[expert] += 1
                pair_P[place] = t * top_k + k
                x_PD[place] = x_TD[t]


@compiled()
def swiglu(projected_TF: Array, gate_column: int, up_column: int, inner_TF: Array) -> None:
    """silu(gate) · up of columns that one product computed, rounded before and after the multiplication.

    Args:
        projected_TF: tokens × outputs of the product.
        gate_column: where the gate's columns begin.
        up_column: where those begin that it is multiplied with.
        inner_TF: tokens × inner size; written.
    """
    num_tokens, inner_size = inner_TF.shape
    for t in range(num_tokens):
        # Slices, for an index that might be negative keeps a loop from becoming vector code.
        gate_F = projected_TF[t, gate_column : gate_column + inner_size]
        up_F = projected_TF[t, up_column : up_column + inner_size]
        for f in range(inner_size):
            gate = load(gate_F[f])
            # Never the power of a positive number, which might be infinite.
            power = exp(-abs(gate))
            sigmoid = (np.float32(1) if gate >= 0 else power) / (np.float32(1) + power)
            activated = rounded(gate * sigmoid, projected_TF)
            inner_TF[t, f] = stored(activated * load(up_F[f]), inner_TF)


@compiled()
def add_pairs(output_PD: Array, pair_P: Ints, count: int, weight_TK: Array, sum_TD: Array) -> None:
    """Adds up each token's weighted experts, in the order of the pairs.

    Args:
        output_PD: each pair's output.
        pair_P: which pairs they are, as `gather_pairs` gave them.
        count: how many there are.
        weight_TK: the pairs' weights.
        sum_TD: tokens × hidden; written. A weighted output is rounded; the sum is taken in float32.
    """
    num_tokens, hidden_size = sum_TD.shape
    total_TD = np.zeros((num_tokens, hidden_size), np.float32)
    for place in range(count):
        t, k = divmod(pair_P[place], weight_TK.shape[1])
        weight = load(weight_TK[t, k])
        output_D, total_D = output_PD[place], total_TD[t]
        for d in range(hidden_size):
            total_D[d] += rounded(load(output_D[d]) * weight, output_PD)
    for t in range(num_tokens):
        for d in range(hidden_size):
            sum_TD[t, d] = stored(total_TD[t, d], sum_TD)


@compiled()
def compute_experts(
    index_TK: Ints, x_TD: Array, weight_TK: Array, gate_up_EI: Ints, down_EI: Ints, inner_size: int, sum_TD: Array
) -> None:
    """All experts of a layer at once, by the functions above and with products that compiled functions can compute.

    Args:
        index_TK: the expert of every pair; below 0 for none.
        x_TD: tokens × hidden.
        weight_TK: the pairs' weights.
        gate_up_EI: describes each expert's gate and up, see `experts.kernels.compiled_product`.
        down_EI: describes each expert's down.
        inner_size: columns of the gate, and of the up.
        sum_TD: tokens × hidden; written.

    Raises:
        IndexError: there is no such expert.
    """
    num_experts, hidden_size, num_pairs = len(gate_up_EI), x_TD.shape[1], index_TK.size
    starts_E = np.empty(num_experts + 1, np.int64)
    pair_P = np.empty(num_pairs, np.int64)
    x_PD = np.empty((num_pairs, hidden_size), x_TD.dtype)
    gather_pairs(index_TK, x_TD, starts_E, pair_P, x_PD)
    count = starts_E[num_experts]
    projected_PF = np.empty((count, 2 * inner_size), x_TD.dtype)
    for expert in range(num_experts):
        multiply(gate_up_EI[expert], x_PD, starts_E[expert], starts_E[expert + 1], projected_PF)
    inner_PF = np.empty((count, inner_size), x_TD.dtype)
    swiglu(projected_PF, 0, inner_size, inner_PF)
    # The inputs are not needed any more.
    for expert in range(num_experts):
        multiply(down_EI[expert], inner_PF, starts_E[expert], starts_E[expert + 1], x_PD)
    add_pairs(x_PD, pair_P, count, weight_TK, sum_TD)
