"""Three Triton kernels that compute the experts of a few tokens. `experts.kernels.triton_small` launches them.

With few tokens, reading the weights dominates the time. So every program reads its part of one expert's weights once,
for all tokens together in one tile of 16 or 32 rows. Programs of unused experts end immediately. The used experts are
read on the device, so there is no synchronisation, and the launches can be captured in a CUDA graph.
"""

# What Triton compiles is not Python with types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl


@triton.jit
def is_named(expert_ptr, pairs, expert, PAIRS: tl.constexpr):
    """Whether any pair names the expert."""
    pair_P = tl.arange(0, PAIRS)
    expert_P = tl.load(expert_ptr + pair_P, mask=pair_P < pairs, other=-1)
    return tl.max((expert_P == expert).to(tl.int32), axis=0) > 0


@triton.jit(do_not_specialize=["tokens", "pairs"])
def gate_up_kernel(
    x_ptr,
    expert_ptr,
    gate_ptr,
    up_ptr,
    inner_ptr,
    tokens,
    pairs,
    EXPERT_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes `silu(x · gateᵀ) · (x · upᵀ)` of one expert, BLOCK_F columns of it: inner [experts, tokens, INNER]."""
    expert = tl.program_id(1)
    if not is_named(expert_ptr, pairs, expert, PAIRS):
        return
    t_T = tl.arange(0, BLOCK_T)
    f_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    d_D = tl.arange(0, BLOCK_D)
    x_ptr_TD = x_ptr + t_T[:, None] * HIDDEN + d_D[None, :]
    start = expert.to(tl.int64) * EXPERT_STRIDE
    weight_DF = f_F[None, :].to(tl.int64) * ROW_STRIDE + d_D[:, None]
    gate_ptr_DF = gate_ptr + start + weight_DF
    up_ptr_DF = up_ptr + start + weight_DF
    gate_TF = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
    up_TF = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
    for d in range(0, HIDDEN, BLOCK_D):
        inside_D = d_D < HIDDEN - d
        x_TD = tl.load(x_ptr_TD + d, mask=(t_T < tokens)[:, None] & inside_D[None, :], other=0.0)
        inside_DF = inside_D[:, None] & (f_F < INNER)[None, :]
        gate_DF = tl.load(gate_ptr_DF + d, mask=inside_DF, other=0.0)
        up_DF = tl.load(up_ptr_DF + d, mask=inside_DF, other=0.0)
        # Only float32 can be rounded on its way in (to TF32); this forbids it.
        gate_TF = tl.dot(x_TD, gate_DF, gate_TF, input_precision="ieee")
        up_TF = tl.dot(x_TD, up_DF, up_TF, input_precision="ieee")
    inner_TF = gate_TF / (1.0 + tl.exp(-gate_TF)) * up_TF
    inner_ptr_TF = inner_ptr + (expert.to(tl.int64) * tokens + t_T[:, None]) * INNER + f_F[None, :]
    tl.store(
        inner_ptr_TF, inner_TF.to(inner_ptr.dtype.element_ty), mask=(t_T < tokens)[:, None] & (f_F < INNER)[None, :]
    )


@triton.jit(do_not_specialize=["tokens", "pairs"])
def down_kernel(
    inner_ptr,
    expert_ptr,
    down_ptr,
    output_ptr,
    tokens,
    pairs,
    EXPERT_STRIDE: tl.constexpr,
    D_STRIDE: tl.constexpr,
    F_STRIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes `inner · downᵀ` of one expert and BLOCK_D of the hidden columns: output [experts, tokens, HIDDEN]."""
    expert = tl.program_id(1)
    if not is_named(expert_ptr, pairs, expert, PAIRS):
        return
    t_T = tl.arange(0, BLOCK_T)
    d_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    f_F = tl.arange(0, BLOCK_F)
    inner_ptr_TF = inner_ptr + (expert.to(tl.int64) * tokens + t_T[:, None]) * INNER + f_F[None, :]
    start = expert.to(tl.int64) * EXPERT_STRIDE
    down_ptr_FD = down_ptr + start + f_F[:, None].to(tl.int64) * F_STRIDE + d_D[None, :].to(tl.int64) * D_STRIDE
    output_TD = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for f in range(0, INNER, BLOCK_F):
        inside_F = f_F < INNER - f
        inner_TF = tl.load(inner_ptr_TF + f, mask=(t_T < tokens)[:, None] & inside_F[None, :], other=0.0)
        down_FD = tl.load(down_ptr_FD, mask=inside_F[:, None] & (d_D < HIDDEN)[None, :], other=0.0)
        output_TD = tl.dot(inner_TF, down_FD, output_TD, input_precision="ieee")
        down_ptr_FD += BLOCK_F * F_STRIDE
    output_ptr_TD = output_ptr + (expert.to(tl.int64) * tokens + t_T[:, None]) * HIDDEN + d_D[None, :]
    inside_TD = (t_T < tokens)[:, None] & (d_D < HIDDEN)[None, :]
    tl.store(output_ptr_TD, output_TD.to(output_ptr.dtype.element_ty), mask=inside_TD)


@triton.jit(do_not_specialize=["tokens", "experts", "top_k"])
def combine_kernel(
    output_ptr,
    expert_ptr,
    weight_ptr,
    sum_ptr,
    tokens,
    experts,
    top_k,
    HIDDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes one token's sum over its experts, in their order: sum [tokens, HIDDEN]."""
    token = tl.program_id(0)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for expert in range(experts):
        for k in range(top_k):
            if tl.load(expert_ptr + token * top_k + k) == expert:
                weight = tl.load(weight_ptr + token * top_k + k).to(tl.float32)
                output_ptr_D = output_ptr + (tl.cast(expert, tl.int64) * tokens + token) * HIDDEN + d_D
                output_D = tl.load(output_ptr_D, mask=d_D < HIDDEN, other=0.0).to(tl.float32)
                # Rounded before the sum, as in the released code.
                sum_D += (output_D * weight).to(sum_ptr.dtype.element_ty).to(tl.float32)
    tl.store(sum_ptr + token * HIDDEN + d_D, sum_D.to(sum_ptr.dtype.element_ty), mask=d_D < HIDDEN)
