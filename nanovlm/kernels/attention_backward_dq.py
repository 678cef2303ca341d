"""Attention's backward pass in Triton (FlashAttention-2, Dao 2023).

With do the gradient of the output, p the weights, and dp = do · vᵀ,

    dv = Σ over queries of pᵀ · do         ds = p · (dp - delta),  delta = Σ over keys of p · dp
    dq = Σ over keys of ds · k · softmax_scale
    dk = Σ over queries of dsᵀ · q · softmax_scale

where delta = Σ out · do, which needs no loop over keys. The weights are computed again from lse:
to read them from memory would take longer. One kernel takes a block of queries and walks over keys,
the other takes a block of keys and walks over queries. That is 7 matrix products instead of 5, but
every sum has one owner and one order (atomic additions have not), so results are deterministic.

The words are those of attention_forward.py.
"""

import triton
import triton.language as tl

from .attention_tiles import load, store, tile_bounds, tile_loop
from .cross_entropy import LOG2E


@triton.jit
def attention_bwd_dq_inner(
    dq_TK,
    queries,
    keys,
    lo_T,
    hi_T,
    bounds,
    qk_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    q_TK, do_TK, lse_T, delta_T = queries
    k, v, stride_kt, stride_vt, seqlen_k = keys
    BLOCK_DMODEL: tl.constexpr = q_TK.shape[1]
    begin, end, gap_begin, gap = tile_loop(bounds, MASKED)
    for i in range(begin, end, BLOCK_N):
        s = i + tl.where(i < gap_begin, 0, gap)
        k_SK = load(k, s, seqlen_k, stride_kt, HEAD_DIM, BLOCK_N, BLOCK_DMODEL, MASKED)
        v_SK = load(v, s, seqlen_k, stride_vt, HEAD_DIM, BLOCK_N, BLOCK_DMODEL, MASKED)
        qk_TS = tl.dot(q_TK, tl.trans(k_SK), input_precision="tf32x3")
        p_TS = tl.exp2(qk_TS * qk_scale - lse_T[:, None])
        if MASKED:
            s_1S = s + tl.arange(0, BLOCK_N)[None, :]
            p_TS = tl.where((s_1S >= lo_T[:, None]) & (s_1S <= hi_T[:, None]), p_TS, 0.0)
        dp_TS = tl.dot(do_TK, tl.trans(v_SK), input_precision="tf32x3")
        ds_TS = (p_TS * (dp_TS - delta_T[:, None])).to(k_SK.dtype)
        dq_TK = tl.dot(ds_TS, k_SK, dq_TK, input_precision="tf32x3")
    return dq_TK


@triton.jit
def attention_bwd_dq_kernel(
    q,
    k,
    v,
    do,
    out,
    lse,
    delta,
    dq,
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
    """The gradient of BLOCK_M queries; and delta, for the other kernel. do, out and dq have no gaps
    between their vectors."""
    batch, head = (tl.program_id(0) // n_heads).to(tl.int64), tl.program_id(0) % n_heads
    if first is not None:
        first, last = first + batch * seqlen_k, last + batch * seqlen_k
    offset = seqlen_k - seqlen_q
    start = offset + (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    lo_T, hi_T, bounds = tile_bounds(
        start, first, last, 0, seqlen_k, window, BLOCK_M, BLOCK_N, CAUSAL, False
    )
    q += batch * stride_qb + head * HEAD_DIM - tl.cast(offset, tl.int64) * stride_qt
    k += batch * stride_kb + head // group_size * HEAD_DIM
    v += batch * stride_vb + head // group_size * HEAD_DIM
    own, stride_ot = ((batch * seqlen_q - offset) * n_heads + head) * HEAD_DIM, n_heads * HEAD_DIM
    line = (batch * n_heads + head) * seqlen_q - offset

    q_TK = load(q, start, seqlen_k, stride_qt, HEAD_DIM, BLOCK_M, BLOCK_DMODEL, True)
    do_TK = load(do + own, start, seqlen_k, stride_ot, HEAD_DIM, BLOCK_M, BLOCK_DMODEL, True)
    out_TK = load(out + own, start, seqlen_k, stride_ot, HEAD_DIM, BLOCK_M, BLOCK_DMODEL, True)
    t_T = start + tl.arange(0, BLOCK_M)
    delta_T = tl.sum(out_TK.to(tl.float32) * do_TK.to(tl.float32), axis=1)
    tl.store(delta + line + t_T, delta_T, mask=t_T < seqlen_k)
    lse_T = tl.load(lse + line + t_T, mask=t_T < seqlen_k, other=float("inf"))
    dq_TK = tl.zeros((BLOCK_M, BLOCK_DMODEL), tl.float32)
    qk_scale = softmax_scale * LOG2E
    queries, keys = (q_TK, do_TK, lse_T, delta_T), (k, v, stride_kt, stride_vt, seqlen_k)
    dq_TK = attention_bwd_dq_inner(
        dq_TK, queries, keys, lo_T, hi_T, bounds, qk_scale, HEAD_DIM, BLOCK_N, False
    )
    dq_TK = attention_bwd_dq_inner(
        dq_TK, queries, keys, lo_T, hi_T, bounds, qk_scale, HEAD_DIM, BLOCK_N, True
    )
    dq_TK = dq_TK * softmax_scale
    store(dq + own, start, seqlen_k, stride_ot, dq_TK, HEAD_DIM, BLOCK_M, BLOCK_DMODEL)
