"""Attention's forward pass in Triton (FlashAttention-2, Dao 2023).

    out = softmax(q · kᵀ / sqrt(K)) · v        over the keys that causal, window and documents allow

The formula in PyTorch writes scores and weights of size T × S to memory and reads them back. Here
q, k and v are read and out is written, no more. A program takes BLOCK_M queries of one head and
loops over the keys that they attend to, BLOCK_N at a time. It keeps the unnormalized output (acc),
the sum of the weights (l) and the maximum score (m) in registers, and scales acc and l down when a
higher score appears (online softmax, Milakov & Gimelshein 2018). Scores are to base 2, the
exponential that a GPU has an instruction for.

By the three rules together, a query attends to an unbroken range of positions, lo to hi, and the
range of a later query begins and ends no earlier. So the keys from the last query's lo to the first
query's hi are attended to by the whole block: they need no mask, and have a loop of their own. Keys
outside of all ranges are never loaded.

In a name, T is BLOCK_M queries, S is BLOCK_N keys, and K is BLOCK_DMODEL (the head size, HEAD_DIM,
rounded up to a power of two). attention_backward.py shares the helpers.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import decode_attention, dispatch

MAX_HEAD_DIM = {2: 256, 4: 128}  # by bytes of a number: larger heads do not fit the registers
LOG2E = math.log2(math.e)
FLOAT32 = {
    (64, 4): ((32, 32, 4, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
    (128, 4): ((16, 32, 4, 1), (32, 16, 8, 1), (16, 32, 8, 1)),
}
TABLE = {  # compute capability: {(BLOCK_DMODEL, bytes of a number): (BLOCK_M, BLOCK_N, num_warps,
    # num_stages) of the forward kernel, of the kernel for dk and dv, of the kernel for dq}
    (0, 0): {  # the interpreter: small, so that short sequences have several blocks
        (256, 4): ((32, 16, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1))
    },
    (8, 0): {
        (64, 2): ((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
        (128, 2): ((128, 32, 8, 3), (64, 64, 8, 3), (64, 64, 8, 2)),
        (256, 2): ((64, 32, 8, 2), (32, 32, 8, 2), (64, 32, 8, 2)),
        **FLOAT32,
    },
    (9, 0): {
        (64, 2): ((128, 128, 8, 2), (64, 128, 8, 3), (128, 64, 8, 3)),
        (128, 2): ((128, 64, 8, 3), (32, 128, 8, 3), (128, 64, 8, 2)),
        (256, 2): ((64, 64, 8, 2), (32, 32, 8, 2), (64, 32, 8, 2)),  # 64 keys would spill 8 bytes
        **FLOAT32,
    },
    (10, 0): {  # triton 3.6 spills with 8 warps where these have 4
        (64, 2): ((128, 64, 8, 3), (64, 128, 8, 3), (128, 64, 4, 2)),
        (128, 2): ((128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 2)),
        (256, 2): ((64, 64, 8, 2), (32, 64, 8, 2), (64, 32, 8, 2)),
        **FLOAT32,
    },
}


def unsupported(q_BTHK, k_BSGK, v_BSGK):
    autocast = dispatch.autocast_dtype(q_BTHK)
    dtype = autocast or q_BTHK.dtype
    max_head_dim = MAX_HEAD_DIM.get(dtype.itemsize, 0)
    if q_BTHK.shape[-1] > max_head_dim:
        return f"attention with heads of more than {max_head_dim} numbers in {dtype}"
    if not (autocast or q_BTHK.dtype == k_BSGK.dtype == v_BSGK.dtype):
        return "attention with queries, keys and values of several dtypes"
    return ""


@dispatch.register("attention", unsupported)
def attention(q_BTHK, k_BSGK, v_BSGK, causal, window, documents_BS, cache_length):
    """Returns out_BTHK, as models/attention.py does; under autocast in its dtype, as PyTorch."""
    if dtype := dispatch.autocast_dtype(q_BTHK):
        q_BTHK, k_BSGK, v_BSGK = (x.to(dtype) for x in (q_BTHK, k_BSGK, v_BSGK))
    ops = torch.ops.nanovlm
    newest_only = causal and q_BTHK.shape[1] == 1 and not torch.is_grad_enabled()
    if cache_length is not None or newest_only:
        return ops.decode_attention(q_BTHK, k_BSGK, v_BSGK, documents_BS, cache_length, window)
    bounds = (None, None) if documents_BS is None else document_bounds(documents_BS)
    return ops.attention(q_BTHK, k_BSGK, v_BSGK, *bounds, causal, window)[0]


def document_bounds(documents_BS):
    """Returns the first and the last position of the document that each position is part of."""
    S = documents_BS.shape[1]
    s_S = torch.arange(S, device=documents_BS.device, dtype=torch.int32)
    is_first_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    is_first_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    is_last_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    is_last_BS[:, :-1] = is_first_BS[:, 1:]
    first_BS = torch.where(is_first_BS, s_S, 0).cummax(1).values
    last_BS = torch.where(is_last_BS, s_S, S - 1).flip(1).cummin(1).values.flip(1)
    return first_BS, last_BS


# ---- Helpers of the forward and backward kernels ----


@triton.jit
def attention_range(
    position,
    first,
    last,
    min_position,
    seqlen_k,
    window,
    CAUSAL: tl.constexpr,
    OF_KEYS: tl.constexpr,
):
    """The positions, lo and hi included, that queries at `position` attend to. With OF_KEYS: that
    attend to keys at `position`; queries begin at min_position."""
    lo, hi = position * 0 + min_position, position * 0 + seqlen_k - 1
    if first is not None:
        lo, hi = tl.maximum(lo, tl.load(first + position)), tl.load(last + position)
    if window is not None:
        lo, hi = tl.maximum(lo, position - window + 1), tl.minimum(hi, position + window - 1)
    if CAUSAL and OF_KEYS:
        lo = tl.maximum(lo, position)
    if CAUSAL and not OF_KEYS:
        hi = tl.minimum(hi, position)
    return lo, hi


@triton.jit
def block_ranges(
    start,
    count,
    offset,
    first,
    last,
    min_position,
    seqlen_k,
    window,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    CAUSAL: tl.constexpr,
    OF_KEYS: tl.constexpr,
):
    """Returns the ranges of the BLOCK tokens from number `start` of `count`, the first of which is
    at position `offset`; and the bounds of the loop over them in steps: from bounds[0] with a mask,
    from bounds[1] without, from bounds[2] to bounds[3] with a mask."""
    position = offset + tl.minimum(start + tl.arange(0, BLOCK), count - 1)
    lo, hi = attention_range(position, first, last, min_position, seqlen_k, window, CAUSAL, OF_KEYS)
    begin, hi_of_first = attention_range(
        offset + start, first, last, min_position, seqlen_k, window, CAUSAL, OF_KEYS
    )
    position = offset + tl.minimum(start + BLOCK, count) - 1
    lo_of_last, end = attention_range(
        position, first, last, min_position, seqlen_k, window, CAUSAL, OF_KEYS
    )
    full_begin = begin + tl.cdiv(tl.maximum(lo_of_last - begin, 0), STEP) * STEP
    full_end = full_begin + tl.maximum(hi_of_first + 1 - full_begin, 0) // STEP * STEP
    return lo, hi, (begin, full_begin, full_end, end + 1)


@triton.jit
def num_steps(bounds, STEP: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        tail = tl.cdiv(tl.maximum(bounds[3] - bounds[2], 0), STEP)
        return (bounds[1] - bounds[0]) // STEP + tail
    return (bounds[2] - bounds[1]) // STEP


@triton.jit
def step_start(i, bounds, STEP: tl.constexpr, MASKED: tl.constexpr):
    """Where step i begins. The masked steps at both ends are one loop, the others another."""
    if MASKED:
        skip = tl.where(bounds[0] + i * STEP < bounds[1], 0, bounds[2] - bounds[1])
        return bounds[0] + i * STEP + skip
    return bounds[1] + i * STEP


@triton.jit
def load(
    ptr,
    start,
    end,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DMODEL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """BLOCK vectors from number `start`; 0 past HEAD_DIM and, if MASKED, past number `end`."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_DMODEL)[None, :]
    ptrs = ptr + tl.cast(start, tl.int64) * stride + row * stride + column
    if MASKED:
        return tl.load(ptrs, mask=(start + row < end) & (column < HEAD_DIM), other=0.0)
    elif HEAD_DIM < BLOCK_DMODEL:
        return tl.load(ptrs, mask=column < HEAD_DIM, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store(
    ptr,
    start,
    end,
    stride,
    value,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DMODEL: tl.constexpr,
):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_DMODEL)[None, :]
    ptrs = ptr + tl.cast(start, tl.int64) * stride + row * stride + column
    mask = (start + row < end) & (column < HEAD_DIM)
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=mask)


# ---- The forward kernel ----


@triton.jit
def attention_fwd_inner(
    acc_TK,
    l_T,
    m_T,
    q_TK,
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
    """Adds a range of keys: acc = Σ 2^(qk - m) · v, l = Σ 2^(qk - m)."""
    for i in range(num_steps(bounds, BLOCK_N, MASKED)):
        s = step_start(i, bounds, BLOCK_N, MASKED)
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
    qk_scale,
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
    # Later causal queries attend to more keys: the longest work first.
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    batch, head = (tl.program_id(0) // n_heads).to(tl.int64), tl.program_id(0) % n_heads
    q += (batch * stride_qb + head * stride_qh) * STRIDE_UNIT
    k += (batch * stride_kb + head // group_size * stride_kh) * STRIDE_UNIT
    v += (batch * stride_vb + head // group_size * stride_vh) * STRIDE_UNIT
    stride_qt, stride_kt = stride_qt * STRIDE_UNIT, stride_kt * STRIDE_UNIT
    stride_vt = stride_vt * STRIDE_UNIT
    if first is not None:
        first, last = first + batch * seqlen_k, last + batch * seqlen_k
    offset = seqlen_k - seqlen_q
    lo_T, hi_T, bounds = block_ranges(
        start, seqlen_q, offset, first, last, 0, seqlen_k, window, BLOCK_M, BLOCK_N, CAUSAL, False
    )

    q_TK = load(q, start, seqlen_q, stride_qt, HEAD_DIM, BLOCK_M, BLOCK_DMODEL, True)
    acc_TK, l_T = tl.zeros((BLOCK_M, BLOCK_DMODEL), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    m_T = tl.full((BLOCK_M,), -1e30, tl.float32)  # not -inf: -inf - -inf is NaN
    for masked in tl.static_range(2):
        acc_TK, l_T, m_T = attention_fwd_inner(
            acc_TK,
            l_T,
            m_T,
            q_TK,
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
    out += (batch * seqlen_q * n_heads + head) * HEAD_DIM
    stride_ot, out_TK = n_heads * HEAD_DIM, acc_TK / l_T[:, None]
    store(out, start, seqlen_q, stride_ot, out_TK, HEAD_DIM, BLOCK_M, BLOCK_DMODEL)
    t_T = start + tl.arange(0, BLOCK_M)
    lse += (batch * n_heads + head) * seqlen_q
    tl.store(lse + t_T, m_T + tl.log2(l_T), mask=t_T < seqlen_q)


# ---- The operator. attention_backward.py registers its derivative ----


def launch_config(x_BTHK):
    """Returns (BLOCK_M, BLOCK_N, num_warps, num_stages) of the forward kernel, of the kernel for dk
    and dv, of the kernel for dq; and BLOCK_DMODEL."""
    block_dmodel = max(16, triton.next_power_of_2(x_BTHK.shape[-1]))
    size, table = x_BTHK.element_size(), dispatch.config(TABLE, x_BTHK.device)
    key = min(key for key in table if key[0] >= block_dmodel and key[1] >= size)
    return *table[key], block_dmodel


@torch.library.custom_op("nanovlm::attention", mutates_args=())
def attention_forward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    first_BS: Tensor | None,
    last_BS: Tensor | None,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Returns (out_BTHK, lse_BHT). lse: log2 of the sum of each query's unnormalized weights, from
    which the backward pass computes the weights again. first_BS, last_BS: see document_bounds."""
    out_BTHK, lse_BHT = attention_forward_fake(q_BTHK, k_BSGK, v_BSGK, None, None, causal, window)
    B, T, H, head_dim = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    tensors, strides, unit = decode_attention.with_strides(q_BTHK, k_BSGK, v_BSGK)
    (block_m, block_n, num_warps, num_stages), _, _, block_dmodel = launch_config(q_BTHK)
    if out_BTHK.numel():
        with torch.cuda.device_of(q_BTHK):
            attention_fwd_kernel[(B * H, triton.cdiv(T, block_m))](
                *tensors,
                out_BTHK,
                lse_BHT,
                first_BS,
                last_BS,
                T,
                S,
                H,
                H // G,
                window,
                LOG2E / head_dim**0.5,
                *strides,
                HEAD_DIM=head_dim,
                CAUSAL=causal,
                STRIDE_UNIT=unit,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCK_DMODEL=block_dmodel,
                num_warps=num_warps,
                num_stages=num_stages,
            )
    return out_BTHK, lse_BHT


@attention_forward.register_fake
def attention_forward_fake(q_BTHK, k_BSGK, v_BSGK, first_BS, last_BS, causal, window):
    B, T, H, _ = q_BTHK.shape
    return q_BTHK.new_empty(q_BTHK.shape), q_BTHK.new_empty((B, H, T), dtype=torch.float32)
