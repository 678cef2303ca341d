"""Attention's forward pass in Triton (FlashAttention-2, Dao 2023).

    out = softmax(q · kᵀ · softmax_scale) · v        softmax_scale = 1 / sqrt(K)

The formula in PyTorch writes scores and weights of size T × S to memory and reads them back. Here
q, k and v are read and out is written, no more. A program takes BLOCK_M queries of one head and
walks over the tiles of attention_tiles.py. For each query it keeps in registers

    m      the highest score so far
    l      the sum of the weights p = 2^(score - m) so far
    acc    the sum of p · v so far

When a higher score appears, l and acc are scaled down by alpha = 2^(m - new m) (online softmax,
Milakov & Gimelshein 2018). At the end out = acc / l. Scores are to base 2, the exponential that a
GPU has an instruction for. `python tests/kernels/trace.py` prints m, l and out tile by tile.

In a name, T is BLOCK_M queries, S is BLOCK_N keys, and K is BLOCK_DMODEL (the head size, HEAD_DIM,
rounded up to a power of two).
"""

import triton
import triton.language as tl

from .attention_tiles import load, store, tile_bounds, tile_loop
from .cross_entropy import LOG2E


@triton.jit
def attention_fwd_inner(
    acc_TK,
    l_T,
    m_T,
    q_TK,
    keys,
    lo_T,
    hi_T,
    bounds,
    qk_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds the full or the masked tiles to acc, l and m."""
    k, v, stride_kt, stride_vt, seqlen_k = keys
    BLOCK_DMODEL: tl.constexpr = q_TK.shape[1]
    begin, end, gap_begin, gap = tile_loop(bounds, MASKED)
    for i in range(begin, end, BLOCK_N):
        s = i + tl.where(i < gap_begin, 0, gap)
        k_SK = load(k, s, seqlen_k, stride_kt, HEAD_DIM, BLOCK_N, BLOCK_DMODEL, MASKED)
        qk_TS = tl.dot(q_TK, tl.trans(k_SK), input_precision="tf32x3")
        if MASKED:
            s_1S = s + tl.arange(0, BLOCK_N)[None, :]
            mask_TS = (s_1S >= lo_T[:, None]) & (s_1S <= hi_T[:, None])
            qk_TS = tl.where(mask_TS, qk_TS, float("-inf"))
        new_m_T = tl.maximum(m_T, tl.max(qk_TS, axis=1) * qk_scale)
        p_TS, alpha_T = tl.exp2(qk_TS * qk_scale - new_m_T[:, None]), tl.exp2(m_T - new_m_T)
        v_SK = load(v, s, seqlen_k, stride_vt, HEAD_DIM, BLOCK_N, BLOCK_DMODEL, MASKED)
        acc_TK = tl.dot(
            p_TS.to(v_SK.dtype), v_SK, acc_TK * alpha_T[:, None], input_precision="tf32x3"
        )
        l_T, m_T = l_T * alpha_T + tl.sum(p_TS, axis=1), new_m_T
    return acc_TK, l_T, m_T


@triton.jit
def attention_fwd_kernel(
    q,
    k,
    v,
    out,
    lse,
    first,
    last,
    seqlen_q,
    seqlen_k,
    n_heads,
    group_size,
    window,
    softmax_scale,
    stride_qb,
    stride_qt,
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DMODEL: tl.constexpr,
):
    """lse: the logarithm to base 2 of the sum of a query's unnormalized weights, (B, H, T)."""
    batch, head = (tl.program_id(0) // n_heads).to(tl.int64), tl.program_id(0) % n_heads
    if first is not None:
        first, last = first + batch * seqlen_k, last + batch * seqlen_k
    offset = seqlen_k - seqlen_q  # the position of the first query
    # Later causal queries attend to more keys: the longest work first.
    start = offset + (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    lo_T, hi_T, bounds = tile_bounds(
        start, first, last, 0, seqlen_k, window, BLOCK_M, BLOCK_N, CAUSAL, False
    )
    q += batch * stride_qb + head * HEAD_DIM - tl.cast(offset, tl.int64) * stride_qt
    k += batch * stride_kb + head // group_size * HEAD_DIM
    v += batch * stride_vb + head // group_size * HEAD_DIM
    out += ((batch * seqlen_q - offset) * n_heads + head) * HEAD_DIM
    lse += (batch * n_heads + head) * seqlen_q - offset

    q_TK = load(q, start, seqlen_k, stride_qt, HEAD_DIM, BLOCK_M, BLOCK_DMODEL, True)
    acc_TK, l_T = tl.zeros((BLOCK_M, BLOCK_DMODEL), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    m_T = tl.full((BLOCK_M,), -1e30, tl.float32)  # not -inf: -inf - -inf is NaN
    qk_scale = softmax_scale * LOG2E
    keys = k, v, stride_kt, stride_vt, seqlen_k
    acc_TK, l_T, m_T = attention_fwd_inner(
        acc_TK, l_T, m_T, q_TK, keys, lo_T, hi_T, bounds, qk_scale, HEAD_DIM, BLOCK_N, False
    )
    acc_TK, l_T, m_T = attention_fwd_inner(
        acc_TK, l_T, m_T, q_TK, keys, lo_T, hi_T, bounds, qk_scale, HEAD_DIM, BLOCK_N, True
    )
    out_TK, t_T = acc_TK / l_T[:, None], start + tl.arange(0, BLOCK_M)
    store(out, start, seqlen_k, n_heads * HEAD_DIM, out_TK, HEAD_DIM, BLOCK_M, BLOCK_DMODEL)
    tl.store(lse + t_T, m_T + tl.log2(l_T), mask=t_T < seqlen_k)
