"""Attention's backward pass in Triton: the kernel for dk and dv. See attention_backward_dq.py."""

import triton
import triton.language as tl

from .attention_tiles import load, store, tile_bounds, tile_loop
from .cross_entropy import LOG2E


@triton.jit
def attention_bwd_dkdv_inner(
    dk_SK,
    dv_SK,
    k_SK,
    v_SK,
    queries,
    lo_S,
    hi_S,
    bounds,
    qk_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    q, do, lse, delta, stride_qt, stride_dot, seqlen_q, seqlen_k, group_size = queries
    BLOCK_DMODEL: tl.constexpr = k_SK.shape[1]
    begin, end, gap_begin, gap = tile_loop(bounds, MASKED)
    i = begin
    for _ in range(group_size * tl.cdiv(end - begin, BLOCK_M)):
        t = i + tl.where(i < gap_begin, 0, gap)
        t_T = t + tl.arange(0, BLOCK_M)
        q_TK = load(q, t, seqlen_k, stride_qt, HEAD_DIM, BLOCK_M, BLOCK_DMODEL, MASKED)
        do_TK = load(do, t, seqlen_k, stride_dot, HEAD_DIM, BLOCK_M, BLOCK_DMODEL, MASKED)
        if MASKED:
            lse_T = tl.load(lse + t_T, mask=t_T < seqlen_k, other=float("inf"))
            delta_T = tl.load(delta + t_T, mask=t_T < seqlen_k, other=0.0)
        else:
            lse_T, delta_T = tl.load(lse + t_T), tl.load(delta + t_T)
        qk_ST = tl.dot(k_SK, tl.trans(q_TK), input_precision="tf32x3")
        p_ST = tl.exp2(qk_ST * qk_scale - lse_T[None, :])
        if MASKED:
            t_1T = t_T[None, :]
            p_ST = tl.where((t_1T >= lo_S[:, None]) & (t_1T <= hi_S[:, None]), p_ST, 0.0)
        dv_SK = tl.dot(p_ST.to(do_TK.dtype), do_TK, dv_SK, input_precision="tf32x3")
        dp_ST = tl.dot(v_SK, tl.trans(do_TK), input_precision="tf32x3")
        ds_ST = (p_ST * (dp_ST - delta_T[None, :])).to(q_TK.dtype)
        dk_SK = tl.dot(ds_ST, q_TK, dk_SK, input_precision="tf32x3")
        # After a head's last tile comes the first of the next head that shares these keys.
        i += BLOCK_M
        is_last = i >= end
        i = tl.where(is_last, begin, i)
        q += tl.where(is_last, HEAD_DIM, 0)
        do += tl.where(is_last, HEAD_DIM, 0)
        lse += tl.where(is_last, seqlen_q, 0)
        delta += tl.where(is_last, seqlen_q, 0)
    return dk_SK, dv_SK


@triton.jit
def attention_bwd_dkdv_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk,
    dv,
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
    """The gradients of BLOCK_N keys and values, over the queries of all heads that share them."""
    n_kv_heads = n_heads // group_size
    batch, head = (tl.program_id(0) // n_kv_heads).to(tl.int64), tl.program_id(0) % n_kv_heads
    if first is not None:
        first, last = first + batch * seqlen_k, last + batch * seqlen_k
    start, offset = tl.program_id(1) * BLOCK_N, seqlen_k - seqlen_q
    lo_S, hi_S, bounds = tile_bounds(
        start, first, last, offset, seqlen_k, window, BLOCK_N, BLOCK_M, CAUSAL, True
    )
    k += batch * stride_kb + head * HEAD_DIM
    v += batch * stride_vb + head * HEAD_DIM
    k_SK = load(k, start, seqlen_k, stride_kt, HEAD_DIM, BLOCK_N, BLOCK_DMODEL, True)
    v_SK = load(v, start, seqlen_k, stride_vt, HEAD_DIM, BLOCK_N, BLOCK_DMODEL, True)
    head_of_q, stride_dot = head * group_size, n_heads * HEAD_DIM  # the first that shares them
    q += batch * stride_qb + head_of_q * HEAD_DIM - tl.cast(offset, tl.int64) * stride_qt
    do += ((batch * seqlen_q - offset) * n_heads + head_of_q) * HEAD_DIM
    line = (batch * n_heads + head_of_q) * seqlen_q - offset
    queries = q, do, lse + line, delta + line, stride_qt, stride_dot, seqlen_q, seqlen_k, group_size
    dk_SK = tl.zeros((BLOCK_N, BLOCK_DMODEL), tl.float32)
    dv_SK = tl.zeros((BLOCK_N, BLOCK_DMODEL), tl.float32)
    qk_scale = softmax_scale * LOG2E
    dk_SK, dv_SK = attention_bwd_dkdv_inner(
        dk_SK, dv_SK, k_SK, v_SK, queries, lo_S, hi_S, bounds, qk_scale, HEAD_DIM, BLOCK_M, False
    )
    dk_SK, dv_SK = attention_bwd_dkdv_inner(
        dk_SK, dv_SK, k_SK, v_SK, queries, lo_S, hi_S, bounds, qk_scale, HEAD_DIM, BLOCK_M, True
    )
    own, stride_kt = (batch * seqlen_k * n_kv_heads + head) * HEAD_DIM, n_kv_heads * HEAD_DIM
    dk_SK = dk_SK * softmax_scale
    store(dk + own, start, seqlen_k, stride_kt, dk_SK, HEAD_DIM, BLOCK_N, BLOCK_DMODEL)
    store(dv + own, start, seqlen_k, stride_kt, dv_SK, HEAD_DIM, BLOCK_N, BLOCK_DMODEL)
