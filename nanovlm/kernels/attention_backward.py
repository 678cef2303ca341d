"""Attention's backward pass in Triton (FlashAttention-2, Dao 2023).

With do the gradient of the output, p the weights, and dp = do · vᵀ,

    dv = Σ over queries of pᵀ · do            ds = p · (dp - delta),  delta = Σ over keys of p · dp
    dq = Σ over keys of ds · k / √K           dk = Σ over queries of dsᵀ · q / √K

where delta = Σ out · do, which needs no loop over keys. The weights are computed again from lse:
to read them from memory would take longer. One kernel takes a block of queries and loops over keys,
the other takes a block of keys and loops over queries. That is 7 matrix products instead of 5, but
every sum has one owner and one order (atomic additions have not), so results are deterministic.

The words, helpers and launch configurations are those of attention_forward.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_forward import (
    LOG2E,
    block_ranges,
    launch_config,
    load,
    num_steps,
    step_start,
    store,
)
from .decode_attention import with_strides


@triton.jit
def attention_bwd_dq_inner(
    dq_TK,
    q_TK,
    do_TK,
    lse_T,
    delta_T,
    k,
    v,
    stride_kt,
    stride_vt,
    lo_T,
    hi_T,
    bounds,
    seqlen_k,
    qk_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DMODEL: tl.constexpr,
    MASKED: tl.constexpr,
):
    for i in range(num_steps(bounds, BLOCK_N, MASKED)):
        s = step_start(i, bounds, BLOCK_N, MASKED)
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
    do,
    q,
    k,
    v,
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
    qk_scale,
    sm_scale,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DMODEL: tl.constexpr,
):
    """The gradient of BLOCK_M queries; and delta, for the other kernel. stride_g: strides of do."""
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    batch, head = (tl.program_id(0) // n_heads).to(tl.int64), tl.program_id(0) % n_heads
    own, stride_ot = (batch * seqlen_q * n_heads + head) * HEAD_DIM, n_heads * HEAD_DIM
    if first is not None:
        first, last = first + batch * seqlen_k, last + batch * seqlen_k
    offset = seqlen_k - seqlen_q
    lo_T, hi_T, bounds = block_ranges(
        start, seqlen_q, offset, first, last, 0, seqlen_k, window, BLOCK_M, BLOCK_N, CAUSAL, False
    )
    q += (batch * stride_qb + head * stride_qh) * STRIDE_UNIT
    k += (batch * stride_kb + head // group_size * stride_kh) * STRIDE_UNIT
    v += (batch * stride_vb + head // group_size * stride_vh) * STRIDE_UNIT
    do += (batch * stride_gb + head * stride_gh) * STRIDE_UNIT
    stride_qt, stride_kt = stride_qt * STRIDE_UNIT, stride_kt * STRIDE_UNIT
    stride_vt, stride_gt = stride_vt * STRIDE_UNIT, stride_gt * STRIDE_UNIT

    do_TK = load(do, start, seqlen_q, stride_gt, HEAD_DIM, BLOCK_M, BLOCK_DMODEL, True)
    out_TK = load(out + own, start, seqlen_q, stride_ot, HEAD_DIM, BLOCK_M, BLOCK_DMODEL, True)
    t_T, line = start + tl.arange(0, BLOCK_M), (batch * n_heads + head) * seqlen_q
    delta_T = tl.sum(out_TK.to(tl.float32) * do_TK.to(tl.float32), axis=1)
    tl.store(delta + line + t_T, delta_T, mask=t_T < seqlen_q)
    lse_T = tl.load(lse + line + t_T, mask=t_T < seqlen_q, other=float("inf"))
    q_TK = load(q, start, seqlen_q, stride_qt, HEAD_DIM, BLOCK_M, BLOCK_DMODEL, True)
    dq_TK = tl.zeros((BLOCK_M, BLOCK_DMODEL), tl.float32)
    for masked in tl.static_range(2):
        dq_TK = attention_bwd_dq_inner(
            dq_TK,
            q_TK,
            do_TK,
            lse_T,
            delta_T,
            k,
            v,
            stride_kt,
            stride_vt,
            lo_T,
            hi_T,
            bounds,
            seqlen_k,
            qk_scale,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_DMODEL,
            masked,
        )
    dq_TK = dq_TK * sm_scale
    store(dq + own, start, seqlen_q, stride_ot, dq_TK, HEAD_DIM, BLOCK_M, BLOCK_DMODEL)


@triton.jit
def attention_bwd_dkdv_inner(
    dk_SK,
    dv_SK,
    k_SK,
    v_SK,
    q,
    do,
    lse,
    delta,
    stride_qt,
    stride_qh,
    stride_gt,
    stride_gh,
    lo_S,
    hi_S,
    bounds,
    group_size,
    seqlen_q,
    offset,
    qk_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DMODEL: tl.constexpr,
    MASKED: tl.constexpr,
):
    n_steps = num_steps(bounds, BLOCK_M, MASKED)
    for i in range(group_size * n_steps):
        head, t = i // n_steps, step_start(i % n_steps, bounds, BLOCK_M, MASKED)
        start = t - offset
        t_T = start + tl.arange(0, BLOCK_M)
        q_head = q + head * stride_qh
        q_TK = load(q_head, start, seqlen_q, stride_qt, HEAD_DIM, BLOCK_M, BLOCK_DMODEL, MASKED)
        do_head = do + head * stride_gh
        do_TK = load(do_head, start, seqlen_q, stride_gt, HEAD_DIM, BLOCK_M, BLOCK_DMODEL, MASKED)
        lse_T = tl.load(lse + head * seqlen_q + t_T, mask=t_T < seqlen_q, other=float("inf"))
        qk_ST = tl.dot(k_SK, tl.trans(q_TK), input_precision="tf32x3")
        p_ST = tl.exp2(qk_ST * qk_scale - lse_T[None, :])
        if MASKED:
            t_1T = t + tl.arange(0, BLOCK_M)[None, :]
            p_ST = tl.where((t_1T >= lo_S[:, None]) & (t_1T <= hi_S[:, None]), p_ST, 0.0)
        dv_SK = tl.dot(p_ST.to(do_TK.dtype), do_TK, dv_SK, input_precision="tf32x3")
        dp_ST = tl.dot(v_SK, tl.trans(do_TK), input_precision="tf32x3")
        delta_T = tl.load(delta + head * seqlen_q + t_T, mask=t_T < seqlen_q, other=0.0)
        ds_ST = (p_ST * (dp_ST - delta_T[None, :])).to(q_TK.dtype)
        dk_SK = tl.dot(ds_ST, q_TK, dk_SK, input_precision="tf32x3")
    return dk_SK, dv_SK


@triton.jit
def attention_bwd_dkdv_kernel(
    do,
    q,
    k,
    v,
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
    qk_scale,
    sm_scale,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DMODEL: tl.constexpr,
):
    """The gradients of BLOCK_N keys and values, over the queries of all heads that share them."""
    start, offset = tl.program_id(1) * BLOCK_N, seqlen_k - seqlen_q
    n_kv_heads = n_heads // group_size
    batch, head = (tl.program_id(0) // n_kv_heads).to(tl.int64), tl.program_id(0) % n_kv_heads
    if first is not None:
        first, last = first + batch * seqlen_k, last + batch * seqlen_k
    lo_S, hi_S, bounds = block_ranges(
        start, seqlen_k, 0, first, last, offset, seqlen_k, window, BLOCK_N, BLOCK_M, CAUSAL, True
    )
    k += (batch * stride_kb + head * stride_kh) * STRIDE_UNIT
    stride_kt = stride_kt * STRIDE_UNIT
    k_SK = load(k, start, seqlen_k, stride_kt, HEAD_DIM, BLOCK_N, BLOCK_DMODEL, True)
    v += (batch * stride_vb + head * stride_vh) * STRIDE_UNIT
    stride_vt = stride_vt * STRIDE_UNIT
    v_SK = load(v, start, seqlen_k, stride_vt, HEAD_DIM, BLOCK_N, BLOCK_DMODEL, True)
    dk_SK = tl.zeros((BLOCK_N, BLOCK_DMODEL), tl.float32)
    dv_SK = tl.zeros((BLOCK_N, BLOCK_DMODEL), tl.float32)
    q += (batch * stride_qb + head * group_size * stride_qh) * STRIDE_UNIT
    stride_qt, stride_qh = stride_qt * STRIDE_UNIT, stride_qh * STRIDE_UNIT
    do += (batch * stride_gb + head * group_size * stride_gh) * STRIDE_UNIT
    stride_gt, stride_gh = stride_gt * STRIDE_UNIT, stride_gh * STRIDE_UNIT
    lse += (batch * n_heads + head * group_size) * seqlen_q
    delta += (batch * n_heads + head * group_size) * seqlen_q
    for masked in tl.static_range(2):
        dk_SK, dv_SK = attention_bwd_dkdv_inner(
            dk_SK,
            dv_SK,
            k_SK,
            v_SK,
            q,
            do,
            lse,
            delta,
            stride_qt,
            stride_qh,
            stride_gt,
            stride_gh,
            lo_S,
            hi_S,
            bounds,
            group_size,
            seqlen_q,
            offset,
            qk_scale,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_DMODEL,
            masked,
        )
    own, stride_ot = (batch * seqlen_k * n_kv_heads + head) * HEAD_DIM, n_kv_heads * HEAD_DIM
    dk_SK = dk_SK * sm_scale
    store(dk + own, start, seqlen_k, stride_ot, dk_SK, HEAD_DIM, BLOCK_N, BLOCK_DMODEL)
    store(dv + own, start, seqlen_k, stride_ot, dv_SK, HEAD_DIM, BLOCK_N, BLOCK_DMODEL)


# ---- The operator, as the derivative of nanovlm::attention ----


@torch.library.custom_op("nanovlm::attention_backward", mutates_args=())
def attention_backward(
    grad_BTHK: Tensor,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    out_BTHK: Tensor,
    lse_BHT: Tensor,
    first_BS: Tensor | None,
    last_BS: Tensor | None,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v."""
    dq_BTHK, dk_BSGK, dv_BSGK = (x.new_empty(x.shape) for x in (q_BTHK, k_BSGK, v_BSGK))
    B, T, H, head_dim = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    tensors, strides, unit = with_strides(grad_BTHK, q_BTHK, k_BSGK, v_BSGK)
    delta_BHT = torch.empty_like(lse_BHT)
    sizes = T, S, H, H // G, window, LOG2E / head_dim**0.5, 1 / head_dim**0.5, *strides
    _, dkdv_config, dq_config, block_dmodel = launch_config(q_BTHK)
    shared = dict(HEAD_DIM=head_dim, CAUSAL=causal, STRIDE_UNIT=unit, BLOCK_DMODEL=block_dmodel)
    with torch.cuda.device_of(q_BTHK):
        if q_BTHK.numel():
            block_m, block_n, num_warps, num_stages = dq_config
            attention_bwd_dq_kernel[(B * H, triton.cdiv(T, block_m))](
                *tensors,
                out_BTHK,
                lse_BHT,
                delta_BHT,
                dq_BTHK,
                first_BS,
                last_BS,
                *sizes,
                **shared,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=num_warps,
                num_stages=num_stages,
            )
        if k_BSGK.numel():
            block_m, block_n, num_warps, num_stages = dkdv_config
            attention_bwd_dkdv_kernel[(B * G, triton.cdiv(S, block_n))](
                *tensors,
                lse_BHT,
                delta_BHT,
                dk_BSGK,
                dv_BSGK,
                first_BS,
                last_BS,
                *sizes,
                **shared,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=num_warps,
                num_stages=num_stages,
            )
    return dq_BTHK, dk_BSGK, dv_BSGK


@attention_backward.register_fake
def attention_backward_fake(
    grad_BTHK, q_BTHK, k_BSGK, v_BSGK, out_BTHK, lse_BHT, first_BS, last_BS, causal, window
):
    return tuple(x.new_empty(x.shape) for x in (q_BTHK, k_BSGK, v_BSGK))


def setup_context(ctx, inputs, output):
    *tensors, ctx.causal, ctx.window = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def backward(ctx, grad_BTHK, _):
    if grad_BTHK is None:
        return (None,) * 7
    grads = torch.ops.nanovlm.attention_backward(
        grad_BTHK, *ctx.saved_tensors, ctx.causal, ctx.window
    )
    return *grads, None, None, None, None


torch.library.register_autograd("nanovlm::attention", backward, setup_context=setup_context)
